# shellcheck shell=bash
# shellcheck disable=SC2034 # the variables are for the scripts that source this
# Functions that the benchmarks share, on top of lib.sh: links, cold caches, timing, traffic, medians.

LINKS=(loopback 20ms-200mbit)
FAR=ocifs-far
# Address of the far end and interface of the near end, as scripts/netdelay/up names them.
FAR_ADDRESS=198.18.0.2
NEAR=near0
# Bytes of the headers of a TCP packet: Ethernet 14, IPv4 20, TCP with time stamps 32.
HEADER_BYTES=66

# link_rtt LINK, link_mbit LINK: print the round trip and the rate of a name such as 20ms-200mbit; nothing for
# loopback.
link_rtt() { sed -nE 's/^([0-9.]+)ms-[0-9.]+mbit$/\1/p' <<<"$1"; }
link_mbit() { sed -nE 's/^[0-9.]+ms-([0-9.]+)mbit$/\1/p' <<<"$1"; }

# known_link LINK: ends the script if LINK is not the name of a link.
known_link() {
    [ "$1" = loopback ] || [ -n "$(link_mbit "$1")" ] || die "no link called $1: it is loopback, or a round trip and a rate such as 20ms-200mbit"
}

# use_link LINK DIR: starts a registry at the far end of a link and ends the one on the link before. Sets REGISTRY to
# its address and REGISTRY_LOG to its log. Pushed images stay in DIR. AT_REGISTRY is a prefix for commands that reach
# the registry without the link. On an emulated link, a front server sends the blobs, as at large registries.
# docker-registry alone would fill a buffer of 4 MiB for every range, which takes 4 ms of a processor that the near
# end shares.
use_link() {
    known_link "$1"
    leave_link
    REGISTRY_LOG=$2/registry.log AT_REGISTRY=()
    if [ "$1" = loopback ]; then
        start_registry "$2"
        return
    fi
    # This keeps the script from taking down the link of another benchmark at its end.
    [ ! -e "/run/netdelay-$FAR" ] || die "the link to $FAR is up already: for another benchmark, or take it down with scripts/netdelay/down"
    LINK_UP=1
    on_exit leave_link
    "$ROOT/scripts/netdelay/up" "$(awk -v rtt="$(link_rtt "$1")" 'BEGIN { print rtt / 2 }')" "$(link_mbit "$1")" "$FAR"
    AT_REGISTRY=(nsenter "--net=/run/netns/$FAR")
    start_registry "$2" "$FAR_ADDRESS:5001" ip netns exec "$FAR"
    # The port is always the same, so that image names are equal on all links.
    start_front "$2/front" "$FAR_ADDRESS:5000" "$2/data" "$REGISTRY"
    FRONT_PID=$STARTED REGISTRY_LOG=$2/front/access.log REGISTRY=$FAR_ADDRESS:5000
}

# start_front DIR ADDRESS DATA REGISTRY [CERTIFICATE KEY]: starts nginx at the far end. It sends the blobs from DATA,
# the directory of a docker-registry, and forwards all other requests to that registry. With a certificate it serves
# HTTPS. Sets STARTED to its process. Its log is DIR/access.log, in the format that `traffic` reads.
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
            # The registry decides whether a repository has a blob.
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

# drop_caches: empties the page cache of both ends.
drop_caches() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
}

# timed COMMAND...: runs a command and leaves its seconds in TOOK.
timed() {
    local start=$EPOCHREALTIME
    "$@" >/dev/null
    TOOK=$(awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.4f", b - a }')
}

# mark_traffic: starts a measurement. traffic: prints what the registry has answered since, as {"requests": N,
# "bytes": N}. It counts only completed responses.
mark_traffic() { TRAFFIC_MARK=$(wc -c <"$REGISTRY_LOG"); }
traffic() {
    tail -c "+$((TRAFFIC_MARK + 1))" "$REGISTRY_LOG" | awk '/response completed/ && match($0, /http.response.written=[0-9]+/) {
        requests++; bytes += substr($0, RSTART + 22, RLENGTH - 22) }
        END { printf "{\"requests\": %d, \"bytes\": %d}", requests, bytes }'
}

# received: prints the bytes of TCP streams that the emulated link has delivered so far, also those of incomplete
# responses.
received() { echo $(($(<"/sys/class/net/$NEAR/statistics/rx_bytes") - HEADER_BYTES * $(<"/sys/class/net/$NEAR/statistics/rx_packets"))); }

# jq functions for the summaries.
JQ_MEDIAN='def median: sort | if length % 2 == 1 then .[(length - 1) / 2] else (.[length / 2 - 1] + .[length / 2]) / 2 end;
    def round2: . * 100 | round / 100;'

# parse_options ARGUMENT...: sets RUNS, JSON, IMAGE and FILES, and LINKS to the named links.
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
