#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Runs in the guest: each TEST@ENGINE of $TESTS in its own session, then puts the machine back as it was.
#
# A test's results are its "@@ ok" and "@@ not ok" lines (lib.sh writes them). Three more are made
# here: a test that ends with a status, one that reports nothing, and one that leaves warnings in the
# kernel's log are failures. When a device cannot be got rid of, "@@ dirty" asks for a new boot.

# It kills every process: never anywhere else.
[[ $(tr '\0' ' ' </proc/1/cmdline) == *guest-init* ]] || { echo "main.sh: not in the guest" >&2; exit 1; }
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh || exit 1

trouble='WARNING:|BUG:|Oops|INFO: task .* blocked|INFO: rcu|Call Trace|Possible stuck request.* Runtime ([3-9][0-9]|[0-9]{3,}) |refcount_t'

start_session() {	# FILE SECONDS: a test, not waited for longer than that
	setsid timeout -k 5 "$2" bash -eu "/run/guest/$1"
}

# restore: what a test may have left behind, in the order in which it can be undone.
restore() {
	local m d name
	while read -r _ m _; do
		[[ $m == /mnt* ]] && bounded 20 umount "$m"
	done < <(tac /proc/mounts)
	[[ $(wc -l </proc/swaps) -le 1 ]] || bounded 20 swapoff -a
	[[ ! -e /sys/module/loop ]] || bounded 20 losetup -D
	[[ ! -e /sys/module/dm_mod ]] || bounded 20 dmsetup remove_all
	for d in /sys/block/nbd*; do
		name=${d##*/}
		[[ -e $d/pid ]] || continue
		bounded 20 nbd-client -d "/dev/$name" >/dev/null
	done
	# All processes but init and this shell.
	kill -KILL -1
	for d in /sys/block/nbd*; do
		[[ -e $d ]] || continue
		wait_for 5 gone "${d##*/}" || echo "@@ dirty ${d##*/} cannot be disconnected"
	done
	wait_for 5 nobody_stuck || echo "@@ dirty a process cannot be killed: $(stuck | tr '\n' ' ')"
	# Timers and flags of a device outlive its attachments: fresh devices for the next test.
	[[ ! -e /sys/module/nbd ]] || bounded 20 modprobe -r nbd || echo "@@ dirty the nbd module cannot be removed"
	# shellcheck disable=SC2115
	rm -rf /tmp/* /run/nbdrs* /run/udev /dev/nbdrs /dev/disk /srv/* /mnt/* /etc/modprobe.d
}
gone() { [[ ! -e /sys/block/$1/pid && $(<"/sys/block/$1/size") == 0 ]]; }
stuck() { ps -eo pid=,stat=,wchan=,comm= | awk -v me=$$ '$1 != 1 && $1 != me && $2 ~ /^D/'; }
nobody_stuck() { [[ -z $(stuck) ]]; }

# processors N: how many of the four run, from now on. Two by default; a test that looks for nothing between two
# processors says "# processors: 1", which costs a TCG guest a quarter less.
online=1
processors() {
	for ((; online < $1; online++)); do
		echo 1 >/sys/devices/system/cpu/cpu$online/online
	done
	for ((; online > $1; online--)); do
		echo 0 >/sys/devices/system/cpu/cpu$((online - 1))/online
	done
}

# The kernel is usually here after 5 s. On a loaded machine every limit grows with what it took.
read -r uptime _ </proc/uptime
SLOW=$((${uptime%.*} / 6 + 1))
export SLOW
echo "@@ slow $SLOW"
for t in $TESTS; do
	f=${t%@*}
	engine=${t#*@}
	export NBDRSD_FLAGS=
	full=
	[[ $engine == auto ]] || NBDRSD_FLAGS=--io-engine=$engine
	seconds=$(sed -n 's/^# deadline: //p' "/run/guest/$f")
	[[ -z ${NBDRS_FULL:-} ]] || full=$(sed -n 's/^# deadline full: //p' "/run/guest/$f")
	seconds=$((${full:-${seconds:-60}} * SLOW))
	echo "@@ begin $t $seconds"
	dmesg -C
	echo 0 >/run/reported
	modprobe nbd nbds_max=4 max_part=8
	processors="$(sed -n 's/^# processors: //p' "/run/guest/$f")"
	processors "${processors:-2}"
	begun=$SECONDS
	status=0
	start_session "$f" "$seconds" || status=$?
	case $status in
	0) [[ $(</run/reported) != 0 ]] || echo "@@ not ok reports at least one result" ;;
	99) ;;	# must: reported already
	124 | 137) echo "@@ not ok ends within $seconds s" ;;
	*) echo "@@ not ok runs to its end (status $status)" ;;
	esac
	allowed=$(sed -n 's/^# kernel log may say: //p' "/run/guest/$f")
	dmesg | grep -E "$trouble" | grep -vE "${allowed:-^\$}" >/run/trouble &&
		echo "@@ not ok leaves no warning in the kernel's log: $(head -n 1 /run/trouble)"
	tail -n 30 /tmp/nbdrsd.log 2>/dev/null | sed 's/^/nbdrsd: /'
	dmesg | tail -n 25 | sed 's/^/kernel: /'
	restore
	echo "@@ end $t $status $((SECONDS - begun))"
done
exit 0
