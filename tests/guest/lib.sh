# SPDX-License-Identifier: GPL-3.0-or-later
# shellcheck shell=bash
#
# lib.sh - what tests in the guest are written with. They run under bash -eu as root, alone, with nbd
# loaded (nbd0 to nbd3), no udevd, and /srv (a disk), /tmp (memory) and /mnt empty. main.sh cleans up
# behind them, so they have no traps.
#
#	check TEXT COMMAND...		one result; goes on
#	must TEXT COMMAND...		one result; ends the test when it fails
#	run COMMAND...			sets rc, out and err
#	fails STATUS ERE TEXT COMMAND...	COMMAND exits with STATUS (an ERE, too), its stderr matches
#	skip TEXT REASON		not run here (in CI a failure: run's policy)
#
# Nothing waits without a limit: attach and everything that touches an nbd device whose server may be
# gone goes through `bounded`.

CTL=/run/nbdrs/control.sock
daemon=	# pid of the nbdrsd that serve started
[[ -p /run/nap ]] || mkfifo /run/nap
SLOW=${SLOW:-1}
exec {nap_fd}<>/run/nap

# nap SECONDS: sleep without a process.
nap() { read -rt "$1" -u "$nap_fd" || :; }

# wait_for SECONDS COMMAND...: until COMMAND succeeds. SLOW is how much slower than usual this guest is.
wait_for() {
	local end=$((SECONDS + $1 * SLOW))
	shift
	until "$@"; do
		((SECONDS < end)) || return 1
		nap 0.05
	done
}

# bounded SECONDS COMMAND...: its status; 124 after SECONDS, even when it cannot be killed.
bounded() {
	local limit=$1 pid
	shift
	"$@" &
	pid=$!
	if wait_for "$limit" ended $pid; then
		wait $pid
		return
	fi
	echo "not done after $limit s (times $SLOW): $* ($(ps -o stat=,wchan= -p $pid))" >&2
	kill -KILL $pid 2>/dev/null
	return 124
}
# ended PID: also when nobody has waited for it yet (kill -0 would say that it lives).
ended() {
	local stat
	read -r stat 2>/dev/null <"/proc/$1/stat" || return 0
	[[ ${stat##*) } == [ZX]* ]]
}

report() {
	echo $(($(</run/reported) + 1)) >/run/reported
	echo "@@ $1 $2"
}

check() {
	local text=$1
	shift
	if "$@"; then
		report ok "$text"
	else
		echo "failed: $*"
		report "not ok" "$text"
		return 0
	fi
}

must() {
	local text=$1
	shift
	if "$@"; then
		report ok "$text"
	else
		echo "failed: $*"
		report "not ok" "$text"
		exit 99
	fi
}

skip() { report skip "$1 # $2"; }

run() {
	rc=0
	"$@" >/tmp/run.out 2>/tmp/run.err || rc=$?
	out=$(</tmp/run.out)
	err=$(</tmp/run.err)
}

fails() {
	local status=$1 ere=$2 text=$3
	shift 3
	run "$@"
	check "$text" said "$status" "$ere"
}
said() {
	[[ $rc =~ ^$1$ && $err =~ $2 ]] && return
	echo "wanted: status $1, '$2'; got: status $rc, stdout '$out', stderr '$err'"
	return 1
}

# --- nbdrs ---------------------------------------------------------------------------------------

# On a slow guest udev may look at the device for longer than nbdrs-attach waits for it.
attach() {
	[[ $SLOW == 1 || ! -e /run/udev/control ]] || udevadm settle --timeout=$((10 * SLOW))
	bounded 45 nbdrs-attach --control $CTL --wait $((10 * SLOW)) "$@"
}

attach_as_nobody() {
	bounded 45 setpriv --reuid=65534 --regid=65534 --clear-groups nbdrs-attach --control $CTL "$@"
}

# make_disk FILE SIZE: a sparse volume.
make_disk() { nbdrsd init --size "$2" raw "file:$1"; }

# serve ARGUMENTS...: start nbdrsd, return when it serves. Sets daemon.
serve() {
	# shellcheck disable=SC2086 # flags, and the program before, are lists
	${SERVED_BY:-} nbdrsd ${NBDRSD_FLAGS:-} "$@" --listen none --control $CTL >>/tmp/nbdrsd.log 2>&1 &
	daemon=$!
	if ! wait_for 30 serves || ended "$daemon"; then
		cat /tmp/nbdrsd.log
		return 1
	fi
}
# One that gives no device new connections.
serve_unprivileged() { SERVED_BY="setpriv --bounding-set=-sys_admin --inh-caps=-all" serve "$@"; }
serves() { ended "$daemon" || nbdrsctl --control $CTL status >/dev/null 2>&1; }

# stop [SIGNAL]: end the daemon; its status.
stop() {
	kill -"${1:-TERM}" "$daemon"
	wait_for 20 ended "$daemon" || { echo "nbdrsd does not end"; return 1; }
	wait "$daemon"
}

# attached EXPORT [OPTION...]: attach it, set dev (/dev/nbdN) and name (nbdN).
attached() {
	run attach "$@"
	dev=$out
	# shellcheck disable=SC2034 # for the caller
	name=${dev##*/}
	[[ $rc == 0 && $dev =~ ^/dev/nbd[0-9]+$ && -b $dev ]] && return
	echo "attach $*: status $rc, stdout '$out', stderr '$err'"
	return 1
}

connected() { [[ -e /sys/block/$1/pid && $(<"/sys/block/$1/size") != 0 ]]; }
disconnected() { [[ ! -e /sys/block/$1/pid && $(<"/sys/block/$1/size") == 0 ]]; }

# --- the machine ---------------------------------------------------------------------------------

start_udevd() {
	/usr/lib/systemd/systemd-udevd --daemon 2>/dev/null
	udevadm trigger --action=add --subsystem-match=block --subsystem-match=module
	udevadm settle --timeout=30
}

# hold DEVICE: a process that has DEVICE open. Its pid is in holder.
hold() {
	# dd waits for a byte that never comes.
	dd of="$1" conv=nocreat,notrunc status=none <&"$nap_fd" &
	holder=$!
	wait_for 5 has_open $holder "$1"
}
has_open() { [[ $(readlink "/proc/$1/fd/1") == "$2" ]]; }
release() {
	kill "$holder"
	wait "$holder" || :
}

# zeroes FILE OFFSET LENGTH: reads as zeroes, past any cache.
zeroes() {
	[[ -z $(dd if="$1" bs=1M iflag=direct,skip_bytes,count_bytes skip="$2" count="$3" status=none |
		tr -d '\0' | head -c 1) ]]
}
# allocated FILE: KiB.
allocated() { echo $(($(stat -c '%b * %B' "$1") / 1024)); }
