# shellcheck shell=bash
# shellcheck disable=SC2034 # the variables are for the scripts that source this
# What the benchmarks share, on top of lib.sh: links, cold caches, timing, traffic, medians.

LINKS=(loopback 20ms-200mbit)
FAR=ocifs-far
# The far end's address and the near end's interface, as scripts/netdelay/up calls it.
FAR_ADDRESS=198.18.0.2
NEAR=near0
# What the headers of a packet with TCP data take: Ethernet 14, IPv4 20, TCP with time stamps 32.
HEADER_BYTES=66

# link_rtt LINK, link_mbit LINK: the parts of a name such as 20ms-200mbit (round trip, rate); nothing for loopback.
link_rtt() { sed -nE 's/^([0-9.]+)ms-[0-9.]+mbit$/\1/p' <<<"$1"; }
link_mbit() { sed -nE 's/^[0-9.]+ms-([0-9.]+)mbit$/\1/p' <<<"$1"; }

# known_link LINK: ends the script if it is none.
known_link() {
    [ "$1" = loopback ] || [ -n "$(link_mbit "$1")" ] || die "no link called $1: it is loopback, or a round trip and a rate such as 20ms-200mbit"
}

# use_link LINK DIR: starts a registry at the far end of the link, and ends the one of the link before; its address is in
# REGISTRY, its log in REGISTRY_LOG. What was pushed stays in DIR. AT_REGISTRY is a prefix for commands that are to reach it
# without the link. Of an emulated link's registry a front hands out the blobs, as with large registries: docker-registry fills
# a buffer of 4 MiB for every range, 4 ms of a processor that is the near end's, too.
use_link() {
    known_link "$1"
    leave_link
    REGISTRY_LOG=$2/registry.log AT_REGISTRY=()
    if [ "$1" = loopback ]; then
        start_registry "$2"
        return
    fi
    # Another benchmark's link is not taken down at the end of this one.
    [ ! -e "/run/netdelay-$FAR" ] || die "the link to $FAR is up already: for another benchmark, or take it down with scripts/netdelay/down"
    LINK_UP=1
    on_exit leave_link
    "$ROOT/scripts/netdelay/up" "$(awk -v rtt="$(link_rtt "$1")" 'BEGIN { print rtt / 2 }')" "$(link_mbit "$1")" "$FAR"
    AT_REGISTRY=(nsenter "--net=/run/netns/$FAR")
    start_registry "$2" "$FAR_ADDRESS:5001" ip netns exec "$FAR"
    # The port is always the same, so that the images keep their names from one link to the next.
    start_front "$2/front" "$FAR_ADDRESS:5000" "$2/data" "$REGISTRY"
    FRONT_PID=$STARTED REGISTRY_LOG=$2/front/access.log REGISTRY=$FAR_ADDRESS:5000
}

# start_front DIR ADDRESS DATA REGISTRY [CERTIFICATE KEY]: nginx at the far end, which hands out the blobs in DATA, the directory
# of a docker-registry, and passes all else on to that; with a certificate over HTTPS. Its process is in STARTED; its log is
# DIR/access.log, of which `traffic` knows the format.
start_front() {
    local dir=$1 address=$2 tls=''
    install_packages nginx-light curl
    mkdir -p "$dir"
    [ -z "${5:-}" ] || tls="ssl; ssl_certificate $5; ssl_certificate_key $6"
    cat >"$dir/nginx.conf" <<NGINX
daemon off;
user root;
worker_processes 1;
pid $dir/pid;
error_log $dir/error.log;
events { worker_connections 1024; }
http {
    log_format registry '\$remote_addr "\$request" \$status response completed http.response.written=\$body_bytes_sent';
    access_log $dir/access.log registry;
    client_body_temp_path $dir/bodies;
    proxy_temp_path $dir/proxied;
    fastcgi_temp_path $dir/unused-fastcgi;
    uwsgi_temp_path $dir/unused-uwsgi;
    scgi_temp_path $dir/unused-scgi;
    sendfile on;
    keepalive_requests 1000000;
    client_max_body_size 0;
    server {
        listen $address $tls;
        location ~ "^/v2/.+/blobs/sha256:([0-9a-f]{2})([0-9a-f]{62})\$" {
            # Whether a repository has a blob is for the registry to say.
            error_page 418 = @registry;
            if (\$request_method != GET) { return 418; }
            default_type application/octet-stream;
            alias $3/docker/registry/v2/blobs/sha256/\$1/\$1\$2/data;
        }
        location / { try_files /none @registry; }
        location @registry {
            proxy_pass http://$4;
            proxy_set_header Host \$http_host;
            proxy_set_header X-Forwarded-Proto \$scheme;
            proxy_http_version 1.1;
            proxy_request_buffering off;
        }
    }
}
NGINX
    "${AT_REGISTRY[@]}" nginx -c "$dir/nginx.conf" -e "$dir/error.log" &
    STARTED=$!
    on_exit stop_process "$STARTED"
    wait_until "nginx (its log: $dir/error.log)" "${AT_REGISTRY[@]}" curl --fail --silent --insecure --max-time 5 "http${tls:+s}://$address/v2/"
}

leave_link() {
    [ -z "${FRONT_PID:-}" ] || stop_process "$FRONT_PID"
    [ -z "${REGISTRY_PID:-}" ] || stop_process "$REGISTRY_PID"
    REGISTRY_PID='' FRONT_PID=''
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
