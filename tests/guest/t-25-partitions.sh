#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Partitions are there the moment attach returns, with udevd and without; none are left over from the
# disk before.
# deadline: 90
# takes: 30
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

for d in gpt mbr none; do
	make_disk /srv/$d.img 64Mi
done
printf 'label: gpt\n,20M\n,20M\n' | sfdisk -q /srv/gpt.img
printf 'label: dos\n,30M\n' | sfdisk -q /srv/mbr.img
serve -e gpt raw file:/srv/gpt.img -e mbr raw file:/srv/mbr.img -e none raw file:/srv/none.img

rounds() {	# NUMBER: each disk on the same device in turn
	local p1 p2
	for _ in $(seq "$1"); do
		attached gpt /dev/nbd1
		p1=$(cat "/sys/block/nbd1/nbd1p1/size" 2>/dev/null)
		[[ -b /dev/nbd1p1 && -b /dev/nbd1p2 && $p1 == $((20 << 11)) ]] || return 1
		attach -d gpt
		attached mbr /dev/nbd1
		p2=$(cat "/sys/block/nbd1/nbd1p1/size" 2>/dev/null)
		[[ -b /dev/nbd1p1 && ! -e /dev/nbd1p2 && $p2 == $((30 << 11)) ]] || return 1
		attach -d mbr
		attached none /dev/nbd1
		[[ ! -e /dev/nbd1p1 ]] || return 1
		attach -d none
	done
}
check "partitions at return, without udevd" rounds 2
start_udevd
check "partitions at return, with udevd" rounds 1

must "attach GPT" attached gpt
mkfs.ext4 -q "${dev}p2"
mount "${dev}p2" /mnt
cp /usr/bin/bash /mnt/
bounded 30 umount /mnt
check "a partition's file system is sound" e2fsck -fn "${dev}p2"
check "links to partitions" [ "$(readlink -f /dev/nbdrs/gpt-part2)" = "${dev}p2" ]
check "detach" attach -d gpt
check "no partition is left" [ ! -e "${dev}p1" ]
