#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Many at once: attach and mount on 8 devices in parallel, each mount at the moment at which attach returns; partitions
# looked for while the size changes; detach against mount; loading of the module against attach.
# deadline: 240
# deadline full: 2400
# takes: 35
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

devices=8
rounds=${NBDRS_FULL:+64}
rounds=${rounds:-2}
resizes=${NBDRS_FULL:+5}
resizes=${resizes:-2}
modprobe -r nbd
modprobe nbd nbds_max=$devices max_part=8
exports=()
make_disk /srv/0.img 48Mi
mkfs.ext4 -q -b 4096 /srv/0.img
for n in $(seq 0 $((devices - 1))); do
	[[ $n == 0 ]] || cp --sparse=always /srv/0.img /srv/$n.img
	mkdir -p /mnt/$n
	exports+=(-e "d$n" raw "file:/srv/$n.img")
done
serve "${exports[@]}"
start_udevd

one() {	# NUMBER: attach, mount at once, write, unmount, detach
	local dev
	dev=$(nbdrs-attach --control $CTL --wait $((10 * SLOW)) "d$1") || { echo "d$1: attach: status $?"; return 1; }
	mount "$dev" "/mnt/$1" || { echo "d$1: mount $dev fails right after attach"; return 1; }
	echo "$2" >"/mnt/$1/round"
	umount "/mnt/$1" || return 1
	nbdrs-attach --control $CTL --wait $((10 * SLOW)) -d "d$1" || { echo "d$1: detach: status $?"; return 1; }
}
round() {	# NUMBER
	local n pids=() ok=0
	for n in $(seq 0 $((devices - 1))); do
		one "$n" "$1" &
		pids+=($!)
	done
	for n in "${pids[@]}"; do
		wait "$n" || ok=1
	done
	return $ok
}
all_rounds() {
	local n
	for n in $(seq "$rounds"); do
		bounded 120 round "$n" || { echo "round $n"; return 1; }
	done
}
must "$rounds rounds of attach and mount on $devices devices at a time" all_rounds
clean() {
	local n
	for n in $(seq 0 $((devices - 1))); do
		e2fsck -fn /srv/$n.img >/dev/null 2>&1 || { echo "$n.img"; return 1; }
	done
}
check "all file systems are sound" clean

# Two tools want one export at once: one device, told to both.
both() {
	local a b
	nbdrs-attach --control $CTL --wait $((10 * SLOW)) d0 >/tmp/a & a=$!
	nbdrs-attach --control $CTL --wait $((10 * SLOW)) d0 >/tmp/b & b=$!
	wait $a && wait $b && [[ $(</tmp/a) == "$(</tmp/b)" && -s /tmp/a ]] && attach -d d0
}
check "two attaches of one export at once end at one device" both

# A partition table is read by udev while the size changes.
printf 'label: gpt\n,20M\n' | sfdisk -q /srv/1.img
must "attach a partitioned disk" attached d1
scans() {
	local n mib
	(while [[ -e /tmp/scan ]]; do blockdev --rereadpt "$dev" 2>/dev/null; partx -u "$dev" 2>/dev/null; done) &
	scanner=$!
	for n in $(seq "$resizes"); do
		mib=$((48 + n * 4 % 5))		# larger, smaller, ...
		bounded 40 nbdrsctl --control $CTL resize --shrink d1 ${mib}Mi >/dev/null || return 1
		[[ $(blockdev --getsize64 "$dev") == $((mib << 20)) ]] || return 1
	done
	rm /tmp/scan
	wait $scanner || :
}
touch /tmp/scan
check "$resizes resizes while partitions are looked for" scans
rm -f /tmp/scan
udevadm settle --timeout=$((10 * SLOW)) || :
check "the partition is there" [ -b "${dev}p1" ]
check "detach" attach -d d1

# Whoever is first: a mounted device is not detached, and a detached one is not mounted.
mount_or_detach() {
	local n m d
	for n in 1 2 3; do
		attached d2 || return 1
		mount "$dev" /mnt/2 2>/dev/null & m=$!
		attach -d d2 2>/dev/null & d=$!
		if wait $m; then
			wait $d || true
			[[ $(findmnt -no SOURCE /mnt/2) == "$dev" ]] || return 1
			cp /usr/bin/bash /mnt/2/ && bounded 30 umount /mnt/2 || return 1
			connected "${dev##*/}" && { attach -d d2 || return 1; }
		else
			wait $d || return 1
		fi
	done
	e2fsck -fn /srv/2.img
}
check "mount against detach, 3 times" mount_or_detach

load_and_attach() {
	local n
	for n in 1 2; do
		udevadm settle --timeout=20
		bounded 20 modprobe -r nbd || return 1
		modprobe nbd nbds_max=$devices max_part=8 &
		attached d3 || return 1
		wait $!
		attach -d d3 || return 1
	done
}
check "the module is loaded while an export is attached, twice" load_and_attach
udevadm settle --timeout=$((10 * SLOW)) || :
