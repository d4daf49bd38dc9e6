# shellcheck shell=bash
# shellcheck disable=SC2034 # the variables are for the scripts that source this
# What the benchmarks share, on top of lib.sh: links, cold caches, timing, traffic, medians.

LINKS=(loopback 20ms-200Mbit)
FAR=ocifs-far

# use_link LINK DIR: starts a registry at the far end of the link; its address is in REGISTRY, its log in REGISTRY_LOG.
use_link() {
    REGISTRY_LOG=$2/registry.log
    case $1 in
    loopback) start_registry "$2" ;;
    20ms-200Mbit)
        on_exit "$ROOT/scripts/netdelay/down" "$FAR"
        "$ROOT/scripts/netdelay/up" 10 200 "$FAR"
        start_registry "$2" 198.18.0.2 ip netns exec "$FAR"
        ;;
    *) die "no link called $1; there are: ${LINKS[*]}" ;;
    esac
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

# mark_traffic, traffic: what the registry has answered in between, as {"requests": N, "bytes": N}.
mark_traffic() { TRAFFIC_MARK=$(wc -c <"$REGISTRY_LOG"); }
traffic() {
    tail -c "+$((TRAFFIC_MARK + 1))" "$REGISTRY_LOG" | awk '/response completed/ && match($0, /http.response.written=[0-9]+/) {
        requests++; bytes += substr($0, RSTART + 22, RLENGTH - 22) }
        END { printf "{\"requests\": %d, \"bytes\": %d}", requests, bytes }'
}

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
