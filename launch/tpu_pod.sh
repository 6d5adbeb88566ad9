#!/usr/bin/env bash
# Trains dit_jax on a Cloud TPU slice of any size, from one host (v4-8) to a pod (v3-256).
#
#   launch/tpu_pod.sh watch --name=dit --project=P --zone=europe-west4-a --type=v3-256 --spot \
#       --bucket=gs://my-bucket --config=configs/xl2.py -- --config.data.path=/mnt/bucket/imagenet-latents
#
# creates the slice, installs, trains, and comes back after every preemption until the run is done. Step by step:
#
#   create    ask for the slice as a queued resource, and wait until it is there
#   install   send this checkout (its last commit) to all hosts and install it there
#   train     start the run on all hosts; it continues when the connection ends, and restarts after a crash
#   status    the state of the slice, and of the run on each host
#   logs      follow the log of one host
#   stop      SIGTERM to the run: it saves and ends
#   recover   after a preemption: delete what is left, then create, install and train
#   watch     recover, again and again, until the run is done
#   fetch     copy metrics, pictures and the newest checkpoint to this machine
#   delete    give the slice back; until then it is paid for
#
# Flags:
#   --name=NAME              of the slice and its queued resource (dit)
#   --project=P --zone=Z     as gcloud is configured, if not given
#   --type=TYPE              v2-N and v3-N, v4-N, v5p-N (N cores), v5litepod-N or v5e-N, v6e-N (N chips)
#   --runtime-version=V      by default the one that the documentation names for the type
#   --spot, --on-demand      cheap and preemptible, or not (--on-demand)
#   --bucket=gs://my-bucket  mounted on all hosts at /mnt/bucket; best with a hierarchical namespace
#   --workdir=DIR            of the run (/mnt/bucket/runs/NAME); all hosts must see the same folder
#   --config=FILE            what to train (configs/xl2.py); what follows -- goes to dit_jax.train as well
#   --repo=URL               install: clone this instead of sending the checkout
#   --worker=N               logs: of which host (0)
#   --out=DIR                fetch: where to (runs/NAME)
#   --poll=SECONDS           between two looks at the slice (30)
#   --dry-run                print the commands, run none
#
# Every command that leaves this machine is printed before it runs, so that it can be pasted. A step that is done twice
# does no harm. For more than one host gcloud wants its key in the ssh agent: ssh-add ~/.ssh/google_compute_engine
#
# Flags and states are those of https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources and
# .../compute/tpus/tpu-vm, and of https://cloud.google.com/tpu/docs/queued-resources and .../tpu/docs/runtimes

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
MOUNT=/mnt/bucket
TRIES=6
# On a host. dit_jax.train ends with 0: done; 1: bad input, which another start would not mend; 75: stopped by SIGTERM
# after saving, or another host was lost: the same command resumes.
CODE=$HOME/dit_jax
VENV=$HOME/dit_jax-venv
RUN=$HOME/dit_jax-run
LOG=$RUN/log

say() { [[ -n ${DRY_RUN:-} ]] || printf '%s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Quotes a word for a shell, if it has to be; of --flag=value the value alone.
quote() {
    local q="'" escaped="'\\''"
    case $1 in
        --[a-z]*=*[!A-Za-z0-9_@%+=:,./-]*) printf '%s=' "${1%%=*}"; quote "${1#*=}" ;;
        '' | *[!A-Za-z0-9_@%+=:,./-]*) printf "'%s'" "${1//$q/$escaped}" ;;
        *) printf '%s' "$1" ;;
    esac
}

quoted() {
    local word line=
    for word in "$@"; do line+=" $(quote "$word")"; done
    printf '%s' "${line# }"
}


# ---- On this machine -------------------------------------------------------------------------------------------------

# Prints a command and runs it. 3 is this script's stdout, also where stdout is read by the script.
run() {
    quoted "$@" >&3
    echo >&3
    if [[ -z $DRY_RUN ]]; then "$@"; fi
}

# again WHY: waits before the next of a caller's tries, each time twice as long.
again() {
    [[ $try -lt $TRIES ]] || return 0
    say "$1; again in $delay s"
    sleep "$delay"
    delay=$((delay * 2))
}

# query ASSUMED ARGS...: what gcloud says, NONE where there is no such thing, ASSUMED in a dry run. Other failures
# are tried again, as far as that may help (the network, the service).
query() {
    local assumed=$1 delay=$BACKOFF try out err
    shift
    for ((try = 1; try <= TRIES; try++)); do
        if out=$(run gcloud "$@" --quiet 2>"$SCRATCH"); then
            echo "${DRY_RUN:+$assumed}$out"
            return
        fi
        if grep -q -e NOT_FOUND -e 'matched no objects' "$SCRATCH"; then
            echo NONE
            return
        fi
        err=$(grep -m 1 ERROR "$SCRATCH" || tail -n 1 "$SCRATCH")
        if grep -q -e PERMISSION_DENIED -e UNAUTHENTICATED -e INVALID_ARGUMENT -e 'active account' "$SCRATCH"; then
            die "$err"
        fi
        again "gcloud failed ($err)"
    done
    die "gcloud failed $TRIES times: $err"
}

# The state of the queued resource and, where it failed, why.
slice_state() {
    query "$1" compute tpus queued-resources describe "$NAME" ${WHERE[@]+"${WHERE[@]}"} \
        --format='value(state.state,state.failedData.error.message)'
}

node_state() {
    query "$1" compute tpus tpu-vm describe "$NAME" ${WHERE[@]+"${WHERE[@]}"} --format='value(state)'
}

# persist WHAT COMMAND...: runs it up to TRIES times while the connection fails, with status 255 from ssh or 1 from
# gcloud (a new host does not answer for a while). Any other status comes from the command on the host and is returned.
persist() {
    local what=$1 delay=$BACKOFF try status
    shift
    for ((try = 1; try <= TRIES; try++)); do
        status=0
        run "$@" || status=$?
        case $status in
            0) return ;;
            1 | 255) ;;
            *) return "$status" ;;
        esac
        again "$what failed (status $status)"
    done
    say "$what failed $TRIES times (status $status)"
    return 255
}

# on_hosts WORKER COMMAND
on_hosts() {
    persist "ssh to worker $1 of $NAME" \
        gcloud compute tpus tpu-vm ssh "$NAME" ${WHERE[@]+"${WHERE[@]}"} --worker="$1" --command="$2" --quiet
}

# copy WORKER FROM... TO
copy() {
    local worker=$1
    shift
    persist "scp with worker $worker of $NAME" \
        gcloud compute tpus tpu-vm scp "$@" ${WHERE[@]+"${WHERE[@]}"} --worker="$worker" --recurse --quiet
}

# Prints HOST: STATE, see on_host_status, also where nothing is installed.
STATUS='if [ -d dit_jax ]; then bash dit_jax/launch/tpu_pod.sh on-host-status; else echo host: none; fi'

unreachable() { die "$1 of $NAME did not succeed on every host: the reason is above"; }

# A command of this script for the hosts, where a connection starts in the home directory.
remote() { printf 'bash dit_jax/launch/tpu_pod.sh %s' "$(quoted "$@")"; }

# HEALTH: new, or waiting where the slice was lost before it was there.
await_active() {
    local state since=$SECONDS
    while :; do
        state=$(slice_state ACTIVE) || exit 1
        case $state in
            ACTIVE*) say "$NAME is ACTIVE"; return ;;
            FAILED*) die "$NAME: the request FAILED: $(explain "$state")" ;;
            SUSPEND*) HEALTH=waiting; say "$NAME: $state"; return ;;
            NONE) die "$NAME: the queued resource has gone" ;;
        esac
        say "$NAME: $state, after $((SECONDS - since)) s"
        sleep "$POLL"
    done
}

explain() {
    local why=${1#FAILED}
    why=${why#"${why%%[![:space:]]*}"}
    echo "${why:-no reason given}"
}

create() {
    ask
    [[ $HEALTH == new ]] || die "$NAME was suspended before it was there (preempted); 'recover' asks again"
}

ask() {
    local state tier=()
    HEALTH=new
    [[ -n $TYPE ]] || die "--type is missing: for example --type=v3-256"
    [[ -z $SPOT ]] || tier=(--spot)
    state=$(slice_state NONE) || exit 1
    case $state in
        NONE) ;;
        FAILED* | SUSPEND*) die "$NAME is there and ${state%%[[:space:]]*}: 'delete' it, or 'recover'" ;;
        *)
            say "$NAME is there already"
            await_active
            return
            ;;
    esac
    run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" ${WHERE[@]+"${WHERE[@]}"} \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${tier[@]+"${tier[@]}"} --quiet ||
        die "gcloud did not create $NAME: its reason (quota, zone, type) is above"
    await_active
}

install() {
    local archive=${TMPDIR:-/tmp}/dit_jax-$NAME.tar.gz unpack
    if [[ -n $REPO ]]; then
        unpack="git clone -q $(quote "$REPO") dit_jax.new"
    else
        if [[ -n $(git -C "$ROOT" status --porcelain 2>/dev/null) ]]; then
            say "note: changes that are not committed are not sent"
        fi
        run git -C "$ROOT" archive --format=tar.gz --output="$archive" HEAD ||
            die "$ROOT is no git checkout: clone the repository, or name one with --repo=URL"
        copy all "$archive" "$NAME:dit_jax.tar.gz" || unreachable install
        unpack="mkdir dit_jax.new && tar -xzf dit_jax.tar.gz -C dit_jax.new"
    fi
    on_hosts all "rm -rf dit_jax.new && $unpack && bash dit_jax.new/launch/tpu_pod.sh on-host-install" ||
        unreachable install
}

# Before a slice is asked for, which is paid for.
check_run() {
    [[ -n $WORKDIR ]] || die "--workdir or --bucket is missing: checkpoints go to a folder that all hosts see," \
        "such as a bucket that --bucket mounts, or NFS"
    [[ -f $ROOT/${CONFIG%%:*} ]] || die "--config=$CONFIG: no such file in $ROOT"
}

train() {
    local command
    command=$(remote on-host-start "--config=$CONFIG" "--workdir=$WORKDIR" ${EXTRA[@]+"${EXTRA[@]}"})
    if [[ -n $BUCKET ]]; then
        command="$(remote on-host-mount "${BUCKET#gs://}") && $command"
    fi
    on_hosts all "$command" || unreachable train
    say "training on all hosts; 'logs' follows it, 'status' sums it up"
}

status() {
    local state node
    state=$(slice_state ACTIVE) || exit 1
    echo "$NAME: $state"
    [[ $state == ACTIVE* ]] || return 0
    node=$(node_state READY) || exit 1
    echo "$NAME: TPU VM $node"
    [[ $node == READY ]] || return 0
    on_hosts all "$STATUS" || unreachable status
}

logs() {
    # Not tried again: a follower that ends is ended by the reader.
    run gcloud compute tpus tpu-vm ssh "$NAME" ${WHERE[@]+"${WHERE[@]}"} --worker="$WORKER" \
        --command='tail -n 100 -F dit_jax-run/log' --quiet
}

stop() { on_hosts all "$(remote on-host-stop)" || unreachable stop; }

remove() {
    run gcloud compute tpus queued-resources delete "$NAME" ${WHERE[@]+"${WHERE[@]}"} --force --quiet ||
        die "gcloud did not delete $NAME: its reason is above"
}

delete() {
    local state
    state=$(slice_state ACTIVE) || exit 1
    if [[ $state == NONE ]]; then
        say "$NAME is not there"
        return
    fi
    remove
}

# Asks for the slice again where it is lost. Sets HEALTH: up, new, or waiting while the service is at work.
revive() {
    local state node
    state=$(slice_state "$1") || exit 1
    case $state in
        ACTIVE*)
            node=$(node_state READY) || exit 1
            case $node in
                READY) HEALTH=up; return ;;
                PREEMPTED | TERMINATED | STOPPED | NONE) say "$NAME: the TPU VM is $node" ;;
                *) HEALTH=waiting; say "$NAME: the TPU VM is $node"; return ;;
            esac
            ;;
        SUSPENDED* | FAILED*) say "$NAME: $state" ;;
        SUSPENDING* | DELETING*) HEALTH=waiting; say "$NAME: $state"; return ;;
        *) ask; return ;;  # none yet, or still in the queue
    esac
    remove
    ask
}

recover() {
    while revive SUSPENDED && [[ $HEALTH == waiting ]]; do sleep "$POLL"; done
    if [[ $HEALTH == up ]]; then
        say "$NAME is there: nothing to recover"
        return
    fi
    install
    train
}

# The first host says how the run is. A slice can be lost at any moment, so that hosts may fail for some rounds.
watch() {
    local report failures=0
    while :; do
        revive NONE
        if [[ $HEALTH != waiting ]]; then
            report=$(on_hosts 0 "$STATUS") || report="host: unheard"
            [[ -z $DRY_RUN ]] || report="host: none"
            report=$(tail -n 1 <<<"$report")
            report=${report#*: }
            say "$NAME: the run is: $report"
            case $report in
                running*) failures=0 ;;
                done*) say "now 'fetch', then 'delete': the slice is paid for until then"; return ;;
                failed*) die "the run of $NAME ended for good: $report; 'logs' has the reason" ;;
                "stopped on request"*) die "the run of $NAME was stopped; 'train' resumes it" ;;
                stopped* | dead*) (train) || failures=$((failures + 1)) ;;
                none*) (install && train) || failures=$((failures + 1)) ;;
                *) failures=$((failures + 1)) ;;
            esac
            [[ -z $DRY_RUN ]] || return 0
            [[ $failures -lt 3 ]] || die "$NAME is ACTIVE, but its hosts failed in three rounds: the reason is above"
        fi
        sleep "$POLL"
    done
}

fetch() {
    local there step names name from=()
    [[ -n $WORKDIR ]] || die "--workdir or --bucket is missing: where is the run?"
    [[ -n $DRY_RUN ]] || mkdir -p "$OUT/checkpoints" 2>/dev/null || die "--out=$OUT: cannot be written"
    if [[ -n $BUCKET && $WORKDIR == "$MOUNT"/* ]]; then
        there=$BUCKET/${WORKDIR#"$MOUNT"/}
        persist "the copy" gcloud storage rsync "$there" "$OUT" --exclude='^(checkpoints|damaged)/.*' --recursive ||
            die "$there cannot be copied: the reason is above"
        names=$(query "$there/checkpoints/STEP/" storage ls "$there/checkpoints/") || exit 1
        step=$(newest "$names")
        [[ -n $step ]] || { say "no checkpoint yet; the rest is in $OUT"; return; }
        persist "the copy" gcloud storage rsync "$there/checkpoints/$step" "$OUT/checkpoints/$step" --recursive ||
            die "$there/checkpoints/$step cannot be copied: the reason is above"
    else
        name=$(quote "$WORKDIR")
        names=$(on_hosts 0 "test -d $name || exit 2; ls -d $name/* $name/checkpoints/* 2>/dev/null || :") ||
            unreachable fetch
        [[ -z $DRY_RUN ]] || names=$(printf '%s\n' "$WORKDIR"/{metrics.jsonl,loss.png,samples,checkpoints/STEP})
        while IFS= read -r name; do
            case ${name#"$WORKDIR"/} in
                '' | checkpoints* | damaged) ;;
                *) from+=("$NAME:$name") ;;
            esac
        done <<<"$names"
        [[ ${#from[@]} -gt 0 ]] || die "$WORKDIR on the first host holds nothing"
        copy 0 "${from[@]}" "$OUT" || unreachable fetch
        step=$(newest "$names")
        [[ -n $step ]] || { say "no checkpoint yet; the rest is in $OUT"; return; }
        copy 0 "$NAME:$WORKDIR/checkpoints/$step" "$OUT/checkpoints" || unreachable fetch
    fi
    say "the run, with checkpoint $step, is in $OUT"
}

# The largest step among paths .../checkpoints/STEP, which are whole: those still being written have another name.
newest() {
    if [[ -n $DRY_RUN ]]; then
        echo STEP
    else
        sed -n 's|.*/checkpoints/\([0-9][0-9]*\)/*$|\1|p' <<<"$1" | sort -n | tail -n 1
    fi
}


# ---- On each host ----------------------------------------------------------------------------------------------------

# Failures there end with 2, which is not tried again.
host_die() { say "error: $(hostname): $*"; exit 2; }

# The number may be another process's, after the host has started anew.
alive() { [[ -f $RUN/pid ]] && grep -qs on-host-supervise "/proc/$(cat "$RUN/pid")/cmdline"; }

note() { echo "$*" >"$RUN/status.part" && mv "$RUN/status.part" "$RUN/status"; }

on_host_install() {
    if alive; then host_die "a run is going on; 'stop' it first"; fi
    if [[ $ROOT != "$CODE" ]]; then
        rm -rf "$CODE"
        mv "$ROOT" "$CODE"
    fi
    # The images come with Python 3.10; uv finds a newer one, or brings it.
    [[ -x $HOME/.local/bin/uv ]] || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv
    "$HOME/.local/bin/uv" venv -q --allow-existing --python '>=3.11' "$VENV"
    "$HOME/.local/bin/uv" pip install -q --python "$VENV/bin/python" -e "${CODE}[tpu]"
    say "$(hostname): installed"
}

# Mounts the bucket, with no caching of names: a checkpoint is written by all hosts, and each must see what the others
# have made. The rename limit is for buckets without a hierarchical namespace.
on_host_mount() {
    if mountpoint -q "$MOUNT"; then
        [[ $(findmnt -n -o SOURCE "$MOUNT") == "$1" ]] || host_die "another bucket is mounted at $MOUNT"
        return
    fi
    if ! command -v gcsfuse >/dev/null; then
        curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg |
            sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
        echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt" \
            "gcsfuse-$(lsb_release -c -s) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
        sudo apt-get -q update
        sudo apt-get -q -y -o DPkg::Lock::Timeout=300 install gcsfuse
    fi
    sudo mkdir -p "$MOUNT"
    sudo chown "$(id -u):$(id -g)" "$MOUNT"
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
        --rename-dir-limit=200000 "$1" "$MOUNT"
}

on_host_start() {
    mkdir -p "$RUN"
    if alive; then
        say "$(hostname): is training already"
        return
    fi
    cd "$CODE"
    note running
    # In a session of its own, so that it outlives the connection.
    setsid nohup bash "$CODE/launch/tpu_pod.sh" on-host-supervise "$VENV/bin/python" -m dit_jax.train "$@" \
        >>"$LOG" 2>&1 </dev/null &
    echo $! >"$RUN/pid"
    say "$(hostname): started; the log is $LOG"
}

# Passes SIGTERM on to a process that has not had it. When a host goes down, the system itself tells every process;
# training takes a second SIGTERM for an order to end at once, and has no handler any more after the first (bit 14 of
# SigCgt, see proc(5)). One that has no handler yet gets it when it has.
pass_on() {
    local caught
    sleep 1
    while caught=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null) && [[ -n $caught ]]; do
        if (((16#$caught >> 14) & 1)); then
            kill -TERM "$1" 2>/dev/null || :
            return
        fi
        sleep 0.5
    done
}

# Runs a command again while another start may help: at most MAX_RESTARTS times in a row, waiting longer each time; a
# run that lasted HEALTHY seconds begins the count anew. SIGTERM is passed on and ends the loop.
on_host_supervise() {
    local child='' stopping='' interrupted status began restarts=0 delay
    local max=${MAX_RESTARTS:-10} healthy=${HEALTHY:-600}
    mkdir -p "$RUN"
    trap 'interrupted=1; [[ -n $stopping ]] || { stopping=1; [[ -z $child ]] || pass_on "$child" & }' TERM INT
    while :; do
        note "running, start $((restarts + 1))"
        say "--- $(date -u '+%Y-%m-%d %H:%M:%S') start $((restarts + 1)): $(quoted "$@")"
        began=$SECONDS
        "$@" &
        child=$!
        [[ -z $stopping ]] || pass_on "$child" &
        while :; do  # a signal ends wait, not the child
            interrupted='' status=0
            wait "$child" || status=$?
            [[ -n $interrupted ]] || break
        done
        child=
        say "--- $(date -u '+%Y-%m-%d %H:%M:%S') ended with status $status"
        if [[ $status == 0 ]]; then
            note "done"
            return
        elif [[ -n $stopping ]]; then
            note "stopped, status $status"
            return "$status"
        elif [[ $status == 1 ]]; then
            note "failed, status 1: $(grep '^error: ' "$LOG" 2>/dev/null | tail -n 1)"
            return 1
        fi
        [[ $((SECONDS - began)) -lt $healthy ]] || restarts=0
        restarts=$((restarts + 1))
        if [[ $restarts -gt $max ]]; then
            note "failed, status $status: gave up after $max restarts"
            return "$status"
        fi
        delay=$((BACKOFF * (1 << (restarts < 7 ? restarts - 1 : 6))))
        note "running, waits $delay s after status $status"
        # By seconds: a signal that comes just before a `wait` would be noticed at the end of it.
        while [[ $delay -gt 0 && -z $stopping ]]; do
            sleep 1 || :
            delay=$((delay - 1))
        done
        if [[ -n $stopping ]]; then
            note "stopped, status $status"
            return "$status"
        fi
    done
}

on_host_status() {
    local state=none
    [[ ! -f $RUN/status ]] || state=$(cat "$RUN/status")
    if [[ $state == running* ]] && ! alive; then state="dead ($state)"; fi
    echo "$(hostname): $state"
}

on_host_stop() {
    if alive; then
        kill -TERM "$(cat "$RUN/pid")"
        while alive; do sleep 0.2; done
        note "stopped on request"
    fi
    on_host_status
}


# ---- The command line ------------------------------------------------------------------------------------------------

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

# Sets the variables that the commands read.
parse() {
    local value
    NAME=dit WHERE=() TYPE='' RUNTIME='' SPOT='' BUCKET='' WORKDIR='' CONFIG=configs/xl2.py REPO='' WORKER=0 OUT=''
    POLL=30 DRY_RUN='' EXTRA=()
    while [[ $# -gt 0 ]]; do
        value=${1#*=}
        case $1 in
            --name=?*) NAME=$value ;;
            --project=?*) WHERE+=(--project="$value") ;;
            --zone=?*) WHERE+=(--zone="$value") ;;
            --type=?*) TYPE=${value/#v5e-/v5litepod-} ;;
            --runtime-version=?*) RUNTIME=$value ;;
            --spot) SPOT=1 ;;
            --on-demand) SPOT='' ;;
            --bucket=?*) BUCKET=${value%/} ;;
            --workdir=?*) WORKDIR=${value%/} ;;
            --config=?*) CONFIG=$value ;;
            --repo=?*) REPO=$value ;;
            --worker=?*) WORKER=$value ;;
            --out=?*) OUT=${value%/} ;;
            --poll=?*) POLL=$value ;;
            --dry-run) DRY_RUN=1 ;;
            --)
                shift
                EXTRA=("$@")
                break
                ;;
            *) die "$1: unknown, or without a value (--flag=VALUE), or a flag of dit_jax.train, which go after --" ;;
        esac
        shift
    done
    [[ $NAME =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] || die "--name=$NAME: lower-case letters, digits and hyphens"
    [[ $POLL =~ ^[0-9]+$ ]] || die "--poll=$POLL: a number of seconds"
    [[ $WORKER =~ ^[0-9]+$ ]] || die "--worker=$WORKER: the number of a host, from 0"
    if [[ -n $BUCKET ]]; then
        [[ $BUCKET =~ ^gs://[a-z0-9][a-z0-9._-]+[a-z0-9]$ ]] || die "--bucket=$BUCKET: as in gs://my-bucket"
        WORKDIR=${WORKDIR:-$MOUNT/runs/$NAME}
    fi
    case $WORKDIR in
        '' | /*) ;;
        gs://*) die "--workdir=$WORKDIR: a path on the hosts; --bucket=gs://my-bucket mounts the bucket at $MOUNT" ;;
        *) die "--workdir=$WORKDIR: an absolute path, the same on all hosts" ;;
    esac
    OUT=${OUT:-runs/$NAME}
    [[ -n $TYPE ]] || return 0
    [[ $TYPE =~ ^[a-z0-9]+-[1-9][0-9]*$ ]] || die "--type=$TYPE: as in v3-256 or v5litepod-16"
    [[ -z $RUNTIME ]] || return 0
    case $TYPE in  # https://cloud.google.com/tpu/docs/runtimes, "PyTorch and JAX"
        v2-* | v3-* | v4-*) RUNTIME=tpu-ubuntu2204-base ;;
        v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
        v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
        v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
        *) die "--type=$TYPE: none of v2, v3, v4, v5litepod (v5e), v5p, v6e; give its --runtime-version as well" ;;
    esac
}

main() {
    BACKOFF=${TPU_POD_BACKOFF:-5}
    local command=${1:-}
    [[ $# -eq 0 ]] || shift
    case $command in
        on-host-*) "${command//-/_}" "$@" ;;
        create | install | train | status | logs | stop | recover | watch | fetch | delete)
            exec 3>&1
            parse "$@"
            if [[ -z $DRY_RUN ]] && ! command -v gcloud >/dev/null; then
                die "gcloud is not on the PATH: https://cloud.google.com/sdk/docs/install"
            fi
            SCRATCH=$(mktemp)
            trap 'rm -f "$SCRATCH"' EXIT
            case $command in train | recover | watch) check_run ;; esac
            "$command"
            ;;
        '' | -h | --help | help) usage ;;
        *) die "$command: unknown command; --help lists them" ;;
    esac
}

main "$@"
