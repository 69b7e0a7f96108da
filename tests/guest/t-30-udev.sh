#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# /dev/nbdrs/NAME: there when attach returns, gone after detach. Without udevd attach does not wait
# for what nobody makes.
# deadline: 120
# takes: 30
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

make_disk /srv/disk0.img 64Mi
make_disk /srv/odd.img 16Mi
make_disk /srv/slow.img 16Mi
make_disk /srv/parts.img 64Mi
printf 'label: dos\n,30M\n' | sfdisk -q /srv/parts.img
serve -e disk0 raw file:/srv/disk0.img -e 'a b/c' raw file:/srv/odd.img -e parts raw file:/srv/parts.img \
	-e slow raw "delay[read=$((8 * SLOW))s]:file:/srv/slow.img"

begun=$SECONDS
must "attach without udevd" attached disk0
check "does not wait for udev" [ $((SECONDS - begun)) -lt $((9 * SLOW)) ]
check "detach without udevd" attach -d disk0

start_udevd
ok=true
for n in 1 2 3; do
	attached disk0 || ok=false
	[[ $(readlink -f /dev/nbdrs/disk0) == "$dev" ]] || { echo "round $n: no link"; ok=false; }
	attach -d disk0 || ok=false
	udevadm settle --timeout=20
	[[ ! -e /dev/nbdrs/disk0 ]] || { echo "round $n: the link stays"; ok=false; }
done
check "the link is there at return and gone after detach, 3 times" $ok

must "attach again" attached disk0
check "by-id link" [ "$(readlink -f /dev/disk/by-id/nbdrs-disk0)" = "$dev" ]
mkfs.ext4 -q "$dev"
check "mount by link" mount /dev/nbdrs/disk0 /mnt
bounded 30 umount /mnt
check "-c takes the link" attach -c /dev/nbdrs/disk0
check "detach by link" attach -d /dev/nbdrs/disk0
check "the device is gone" disconnected "$name"

# Several connections: systemd hears of it when all have been tried out. Until then files say so to the rules.
mkdir -p /run/udev/rules.d
unready() { udevadm info -q property "${1:-$dev}" | grep -qx SYSTEMD_READY=0; }
ready() { ! unready; }
marks() { find /run/nbdrs-attach -type f 2>/dev/null; }
look_again() {
	udevadm control --reload
	udevadm trigger --settle "$dev"
}
must "attach with 2 connections" attached -C 2 disk0 /dev/nbd2
check "it is ready" wait_for 10 ready
check "nothing is left that holds it" [ -z "$(marks)" ]
# As it is between the two: a tool that was killed before it has tried the device out leaves that.
echo 'KERNEL=="nbd2", ENV{SYSTEMD_READY}="0"' >/run/udev/rules.d/99-z.rules
look_again
rm /run/udev/rules.d/99-z.rules
for mark in device-nbd2 export-disk0; do
	touch /run/nbdrs-attach/$mark
	look_again
	check "$mark: it stays as unready as it was" unready
	rm /run/nbdrs-attach/$mark
done
touch /run/nbdrs-attach/{device-nbd2,export-disk0}
must "attach it again" attached disk0
check "it is ready now" wait_for 10 ready
check "and nothing holds it" [ -z "$(marks)" ]
touch /run/nbdrs-attach/{device-nbd2,export-disk0}
look_again
check "what was announced stays so" ready
check "detach, once more" attach -d disk0
udevadm settle --timeout=20

# A disk that CONNECT makes, or whose first event comes late: udev knows nothing of it.
first_event() {	# DEVICE
	rm -f "/run/udev/data/b$(<"/sys/class/block/${1##*/}/dev")"
	udevadm trigger --action=add --settle "$1"
}
must "attach one with a partition" attached -C 2 parts /dev/nbd2
check "it is ready, too" wait_for 10 ready
for mark in device-nbd2 export-parts; do
	touch /run/nbdrs-attach/$mark
	first_event "$dev"
	check "$mark: udev's first event finds it unready" unready
	first_event "${dev}p1"
	check "$mark: and its partition" unready "${dev}p1"
	rm /run/nbdrs-attach/$mark
	look_again
	check "$mark: it is ready without" ready
done
# The disk's event may come before the backend is there, and so before its name is known.
echo 'KERNEL=="nbd2", ENV{SYSTEMD_READY}="0", ENV{ID_NBDRS}=""' >/run/udev/rules.d/99-z.rules
look_again
touch /run/nbdrs-attach/device-nbd2
first_event "${dev}p1"
check "a partition of a disk without a name is unready" unready "${dev}p1"
rm /run/udev/rules.d/99-z.rules /run/nbdrs-attach/device-nbd2
udevadm control --reload
check "detach that" attach -d parts
udevadm settle --timeout=20

# What does not work is undone, and not announced while somebody has it open still.
hold_open() {
	sized() { [[ $(</sys/block/nbd2/size) != 0 ]]; }
	wait_for 20 sized
	exec {node}</dev/nbd2
	wait_for 60 test -e /tmp/let-go
}
rm -f /tmp/let-go
hold_open &
holder=$!
fails 8 'something still has it open' "an attach that fails while somebody has it open" \
	attach --wait $((3 * SLOW)) -C 2 slow /dev/nbd2
udevadm settle --timeout=$((20 * SLOW))
check "it looks as if it were attached" [ "$(</sys/block/nbd2/size)" != 0 ]
check "it is held back" ls /run/nbdrs-attach/{device-nbd2,export-slow}
check "and unready" unready
touch /tmp/let-go
wait $holder
check "then it is free" wait_for 10 disconnected nbd2
udevadm settle --timeout=20
check "and still unready" unready
rm -f /run/nbdrs-attach/export-slow
must "attach another export there" attached -C 2 disk0 /dev/nbd2
check "that is ready" wait_for 10 ready
check "nothing holds it" [ -z "$(marks)" ]
check "detach it, too" attach -d disk0
udevadm settle --timeout=20

must "attach an export whose name is no file name" attached 'a b/c'
check "its link is escaped" [ "$(readlink -f '/dev/nbdrs/a\x20b\x2fc')" = "$dev" ]
check "-l names it as it is" [ "$(attach -l --json | jq -r '.devices[0].export')" = 'a b/c' ]
check "detach by that name" attach -d 'a b/c'
