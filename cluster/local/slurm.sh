#!/usr/bin/env bash
# A real Slurm on one machine, with pretended nodes, to rehearse job scripts: preemption, time limits, dead nodes.
#
#   apt-get install --no-install-recommends slurmctld slurmd slurm-client munge      # Debian 12
#   cluster/local/slurm.sh up DIR [NODES]     start it in a new folder; needs root
#   source DIR/env                            then sbatch, squeue, mtp submit --site local, ...
#   cluster/local/slurm.sh kill-node DIR n2   power cut: slurmd and all tasks of the node die
#   cluster/local/slurm.sh revive-node DIR n2
#   cluster/local/slurm.sh down DIR           end it and delete the folder
#
# Nothing outside DIR is written and all sockets are on 127.0.0.1. Every node is a slurmd in namespaces of its own, so
# that jobs see the host names n1, n2, ...; PORT (26900) and the ones after it must be free. Partitions: `train`, and
# `urgent`, which takes nodes away from it after 15 s of grace.
set -euo pipefail

fail() { echo "slurm.sh: $*" >&2; exit 1; }

within() { # SECONDS COMMAND...: until the command succeeds
    local until=$((SECONDS + $1)); shift
    until "$@" &>/dev/null; do ((SECONDS < until)) || return 1; sleep 0.2; done
}

configuration() { # DIR NODES PORT
    local dir=$1 node
    cat <<CONF
ClusterName=rehearsal
SlurmctldHost=$(uname -n)(127.0.0.1)
SlurmctldPort=$3
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again; less than 5 counts as 120
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=5
TCPTimeout=2
KillWait=15
InactiveLimit=0
CompleteWait=0
MinJobAge=3600
CONF
    for ((node = 1; node <= $2; node++)); do
        echo "NodeName=n$node NodeHostname=n$node NodeAddr=127.0.0.1 Port=$(($3 + node)) CPUs=8 RealMemory=16000"
    done
    echo "PartitionName=train Nodes=n[1-$2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=15"
    echo "PartitionName=urgent Nodes=n[1-$2] PriorityTier=9 PreemptMode=OFF"
}

start_node() { # DIR NAME
    unshare --mount --uts -- bash -euc '
        mount --make-rprivate /
        mount --bind "$1/hosts" /etc/hosts
        hostname "$2"
        readlink /proc/self/ns/uts >"$1/$2.namespace"
        SLURM_CONF=$1/slurm.conf exec slurmd -N "$2"' node "$1" "$2"
}

end_node() { # DIR NAME: every process in the node's namespace was started by its slurmd
    local own process
    own=$(cat "$1/$2.namespace" 2>/dev/null) || return 0
    [[ $own && $own != "$(readlink /proc/self/ns/uts)" ]] || return 0
    for process in /proc/[0-9]*; do
        if [[ $(readlink "$process/ns/uts" 2>/dev/null) == "$own" ]]; then kill -KILL "${process#/proc/}" || true; fi
    done 2>/dev/null
}

end_daemon() { # DIR NAME: by its pid file, if the process is the one that was started here
    local pid
    pid=$(cat "$1/$2.pid" 2>/dev/null) || return 0
    [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "$2" ]] || return 0
    [[ $(tr '\0' '\n' <"/proc/$pid/cmdline"; tr '\0' '\n' <"/proc/$pid/environ") == *"$1/"* ]] || return 0
    kill -TERM "$pid" 2>/dev/null || return 0
    within 5 test ! -e "/proc/$pid" || kill -KILL "$pid" 2>/dev/null || true
}

all_idle() { [[ $(sinfo -h -N -p train -t idle -o %N | sort -u | wc -l) -eq $1 ]]; }

up() { # DIR NODES
    local program node nodes=${2:-2} port=${PORT:-26900}
    ((EUID == 0)) || fail "must run as root"
    for program in munged munge slurmctld slurmd sbatch unshare; do
        command -v "$program" >/dev/null || fail "$program is not installed (see the top of this file)"
    done
    [[ ! -e $1 ]] || fail "$1 exists already"
    mkdir -p "$1"/{state,spool}
    local dir; dir=$(cd "$1" && pwd -P)
    chmod 755 "$dir" && touch "$dir/.rehearsal"
    for ((node = 1; node <= nodes; node++)); do mkdir "$dir/spool/n$node"; done
    configuration "$dir" "$nodes" "$port" >"$dir/slurm.conf"
    { echo "127.0.0.1 localhost $(uname -n)"; for ((node = 1; node <= nodes; node++)); do echo "127.0.0.1 n$node"; done; } >"$dir/hosts"
    echo "export SLURM_CONF=$dir/slurm.conf" >"$dir/env"
    # variables of a job that this may run in would confuse the daemons
    for program in $(compgen -e | grep -E '^(SLURM|SLURMD|SBATCH)_' || true); do unset "$program"; done
    export SLURM_CONF=$dir/slurm.conf
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    munged --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munge.log" --seed-file="$dir/munge.seed"
    within 10 munge -S "$dir/munge.socket" -n || fail "munged does not answer: $dir/munge.log"
    slurmctld -c
    within 20 eval "scontrol ping | grep -q 'is UP'" || fail "slurmctld does not answer: $dir/slurmctld.log"
    for ((node = 1; node <= nodes; node++)); do start_node "$dir" "n$node"; done
    within 30 all_idle "$nodes" || fail "nodes are not idle: see $dir/n1.log"
    echo "source $dir/env"
}

down() { # DIR
    [[ -e $1/.rehearsal ]] || fail "$1 was not made by this script"
    local dir file; dir=$(cd "$1" && pwd -P)
    export SLURM_CONF=$dir/slurm.conf
    for file in "$dir"/n*.namespace; do [[ -e $file ]] && end_node "$dir" "$(basename "$file" .namespace)"; done
    end_daemon "$dir" slurmctld
    end_daemon "$dir" munged
    rm -rf -- "$dir"
}

case ${1:-} in
up) up "${2:?folder}" "${3:-2}" ;;
down) down "${2:?folder}" ;;
kill-node) [[ -e $2/.rehearsal ]] || fail "$2 was not made by this script"; end_node "$(cd "$2" && pwd -P)" "${3:?node}" ;;
revive-node) [[ -e $2/.rehearsal ]] || fail "$2 was not made by this script"; start_node "$(cd "$2" && pwd -P)" "${3:?node}" ;;
*) sed -n '2,/^set -/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2 ;;
esac
