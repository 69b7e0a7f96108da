#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Runs in the systemd guest at each boot: is what fstab and attach.conf ask for there, without a hand? Then a reboot, by
# boots.py's word as it is or with the store gone. BOOT is the number of this boot, from 1.
for p in /sys/class/virtio-ports/*; do
	[[ $(<"$p/name") == nbdrs.out ]] && port=/dev/${p##*/}
done
exec 3>"$port" >&3 2>&1 </dev/null
# shellcheck source=/dev/null
. /run/guest/env
echo 0 >/run/reported
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh
at_exit() {
	(($1 == 0)) && return
	systemctl --failed --no-pager
	journalctl -b --no-pager _PID=1 + _SYSTEMD_UNIT=nbdrs.service + _COMM=nbdrs-attach -o short-monotonic -n 60
	echo "@@ done $1"
	echo b >/proc/sysrq-trigger
}
trap 'at_exit $?' EXIT
echo "@@ booted $(uname -r) $(cut -d' ' -f1 /proc/uptime)"
# Everything is relative to how fast this guest is today.
read -r uptime _ </proc/uptime
SLOW=$((${uptime%.*} / 15 + 1))

mounted_from() {	# MOUNTPOINT DEVICE
	[[ $(findmnt -no SOURCE "$1") == "$2" ]]
}
nothing_failed() {
	local failed
	failed=$(systemctl --failed --plain --no-legend)
	[[ -z $failed ]] && return
	echo "$failed"
	systemctl --failed --plain --no-legend | while read -r unit _; do
		systemctl status --no-pager -n 30 "$unit"
	done
	return 1
}
state() {	# of all devices: what a second attach, or another order, would change
	nbdrsctl status --json | jq -c '[.exports[] | [.name, .devices]]'
	nbdrs-attach -l
	find /dev/nbdrs /dev/disk/by-id -type l -printf '%p -> %l\n' | sort
	findmnt -rno TARGET,SOURCE /data /part
}

is_as_before() {
	diff <(echo "$before") <(state)
}

must "boot $BOOT: the file system in fstab is mounted, by x-systemd.requires" mounted_from /data /dev/nbd2
must "boot $BOOT: so is a partition that only attach.conf knows of" wait_for 30 mounted_from /part "$(readlink -f /dev/nbdrs/disk1-part1)"
check "boot $BOOT: no unit has failed" nothing_failed
[[ $BOOT == 1 ]] || check "boot $BOOT: what the last boot wrote is there" [ "$(cat /data/boot /part/boot)" = "$((BOOT - 1))
$((BOOT - 1))" ]

if [[ $BOOT == 1 ]]; then
	check "device and connections are those of attach.conf" \
		[ "$(nbdrsctl status --json disk0 | jq -r '.exports[0].devices[0] | "\(.device) \(.connections)"')" = "/dev/nbd2 2" ]
	check "the queue is set up" [ "$(cat /sys/block/nbd2/queue/{rotational,read_ahead_kb}) $(grep -c '\[none\]' /sys/block/nbd2/queue/scheduler)" = "0
1024 1" ]
	check "the daemon feeds the watchdog" [ "$(systemctl show -P WatchdogUSec nbdrs)" = 30s ]
	check "the daemon lends from the page cache (mincore is let through)" eval '
		for _ in 1 2 3 4 5 6; do dd if=/dev/nbd2 of=/dev/null bs=1M count=8 iflag=direct status=none; done
		[[ $(nbdrsctl status --json disk0 | jq "[.exports[0].layers[].lent // 0] | add") -gt 0 ]]'
	pid=$(systemctl show -P MainPID nbdrs)
	is_next() { [[ "$(nbdrsctl version --json | jq .generation) $(systemctl show -P MainPID nbdrs)" == "1 $pid" ]]; }
	check "systemctl reload nbdrs: another program" bounded 60 systemctl reload nbdrs
	check "in the same process" wait_for 30 is_next
	check "the file system on it goes on" bounded 60 eval 'echo 1 >/data/life && sync -f /data'
	# What is written meanwhile arrives, and nobody is told of an error.
	goes_on() {	# COMMAND...: while somebody writes
		local writer rc=0 old new
		old=$(systemctl show -P MainPID nbdrs)
		dmesg -C
		(for n in {1..20}; do head -c 512k /dev/urandom >/data/w.$n && sync /data/w.$n || exit 1; nap 0.05; done) &
		writer=$!
		"$@" || return 1
		wait_for 60 ended $writer || { echo "the writer hangs"; return 1; }
		wait $writer || { echo "the writer failed"; rc=1; }
		new=$(systemctl show -P MainPID nbdrs)
		[[ $new != 0 && $new != "$old" ]] || { echo "it is still process $new"; rc=1; }
		mounted_from /data /dev/nbd2 && ! dmesg | grep "I/O error" && return $rc
	}
	check "systemctl restart nbdrs under a mounted file system" goes_on systemctl restart nbdrs
	check "kill -9 of the daemon: systemd starts it, devices are connected again" goes_on systemctl kill -s KILL nbdrs
	devices_live() { [[ $(nbdrs-attach -l --json | jq '[.devices[] | select(.state == "live")] | length') == 2 ]]; }
	check "both devices are live" wait_for 30 devices_live
	before=$(state)
	for ((n = 0; n < TRIGGERS; n++)); do
		udevadm trigger
		udevadm settle --timeout=30
	done
	udevadm trigger --action=add
	udevadm settle --timeout=30
	systemctl start nbdrs-autoattach
	check "udevadm trigger, $TRIGGERS times, changes nothing" is_as_before
	check "nor does it start anything that fails" nothing_failed
fi

echo "$BOOT" | tee /data/boot >/part/boot
if [[ ${AWAY:-} ]]; then
	sync -f /part
	head -c 4M /dev/urandom >/part/lost
	touch /run/store-away
fi
echo "@@ done 0"
# It may end us before its command returns.
trap - EXIT
exec systemctl reboot
