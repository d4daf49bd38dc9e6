# shellcheck shell=bash
# shellcheck disable=SC2034 # the variables are for the scripts that source this
# What the benchmarks share, on top of lib.sh: links, cold caches, timing, traffic, medians.

LINKS=(loopback 20ms-200mbit)
FAR=ocifs-far
# The near end's interface, as scripts/netdelay/up calls it.
NEAR=near0
# What the headers of a packet with TCP data take: Ethernet 14, IPv4 20, TCP with time stamps 32.
HEADER_BYTES=66

# link_rtt LINK, link_mbit LINK: the parts of a name such as 20ms-200mbit (round trip, rate); nothing for loopback.
link_rtt() { sed -nE 's/^([0-9.]+)ms-[0-9.]+mbit$/\1/p' <<<"$1"; }
link_mbit() { sed -nE 's/^[0-9.]+ms-([0-9.]+)mbit$/\1/p' <<<"$1"; }

# use_link LINK DIR: starts a registry at the far end of the link, and ends the one of the link before; its address is in
# REGISTRY, its log in REGISTRY_LOG. What was pushed stays in DIR. AT_REGISTRY is a prefix for commands that are to reach it
# without the link.
use_link() {
    leave_link
    REGISTRY_LOG=$2/registry.log AT_REGISTRY=()
    if [ "$1" = loopback ]; then
        start_registry "$2"
        return
    fi
    [ -n "$(link_mbit "$1")" ] || die "no link called $1: it is loopback, or a round trip and a rate such as 20ms-200mbit"
    # Another benchmark's link is not taken down at the end of this one.
    [ ! -e "/run/netdelay-$FAR" ] || die "the link to $FAR is up already: for another benchmark, or take it down with scripts/netdelay/down"
    LINK_UP=1
    on_exit leave_link
    "$ROOT/scripts/netdelay/up" "$(awk -v rtt="$(link_rtt "$1")" 'BEGIN { print rtt / 2 }')" "$(link_mbit "$1")" "$FAR"
    AT_REGISTRY=(nsenter "--net=/run/netns/$FAR")
    # The port is always the same, so that the images keep their names from one link to the next.
    start_registry "$2" 198.18.0.2:5000 ip netns exec "$FAR"
}

leave_link() {
    [ -z "${REGISTRY_PID:-}" ] || stop_process "$REGISTRY_PID"
    REGISTRY_PID=
    [ -z "${LINK_UP:-}" ] || "$ROOT/scripts/netdelay/down" "$FAR"
    LINK_UP=
}

# Nothing of any file is in memory afterwards, on either end.
drop_caches() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
}

# timed COMMAND...: runs it and leaves the seconds it took in TOOK.
timed() {
    local start=$EPOCHREALTIME
    "$@" >/dev/null
    TOOK=$(awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.4f", b - a }')
}

# mark_traffic, traffic: what the registry has answered in between, as {"requests": N, "bytes": N}. A response counts when it
# has ended.
mark_traffic() { TRAFFIC_MARK=$(wc -c <"$REGISTRY_LOG"); }
traffic() {
    tail -c "+$((TRAFFIC_MARK + 1))" "$REGISTRY_LOG" | awk '/response completed/ && match($0, /http.response.written=[0-9]+/) {
        requests++; bytes += substr($0, RSTART + 22, RLENGTH - 22) }
        END { printf "{\"requests\": %d, \"bytes\": %d}", requests, bytes }'
}

# received: the bytes of TCP streams that have come over the emulated link so far; of responses that have not ended, too.
received() { echo $(($(<"/sys/class/net/$NEAR/statistics/rx_bytes") - HEADER_BYTES * $(<"/sys/class/net/$NEAR/statistics/rx_packets"))); }

# jq functions for the summaries.
JQ_MEDIAN='def median: sort | if length % 2 == 1 then .[(length - 1) / 2] else (.[length / 2 - 1] + .[length / 2]) / 2 end;
    def round2: . * 100 | round / 100;'

# parse_options ARGUMENT...: sets RUNS, JSON, IMAGE, FILES, and LINKS to those named.
parse_options() {
    RUNS=5 JSON='' FILES=''
    local links=()
    while (($#)); do
        case $1 in
        --runs) RUNS=$2 ;;
        --image) IMAGE=$2 ;;
        --files) FILES=$(readlink -f "$2") ;;
        --link) links+=("$2") ;;
        --json) JSON=1 ;;
        *)
            sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" >&2
            exit 2
            ;;
        esac
        [ "$1" = --json ] || shift
        shift
    done
    ((${#links[@]} == 0)) || LINKS=("${links[@]}")
}
