#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Detach refuses a device in use, names who uses it, and leaves it working.
# deadline: 120
# takes: 12
# processors: 1
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

make_disk /srv/disk0.img 64Mi
printf 'label: gpt\n,20M\n,20M\n' | sfdisk -q /srv/disk0.img
serve -e disk0 raw file:/srv/disk0.img
must "attach" attached disk0
mkfs.ext4 -q "${dev}p1"
mkswap -q "${dev}p2" 2>/dev/null || mkswap "${dev}p2" >/dev/null

mkdir /mnt/here
mount "${dev}p1" /mnt/here
fails 9 /mnt/here "mounted partition: status 9, names the mount point" attach -d "$dev"
fails 9 /mnt/here "the same by export name" attach -d disk0
check "still usable" cp /usr/bin/bash /mnt/here/
bounded 30 umount /mnt/here

must "swap on" swapon "${dev}p2"
fails 9 swap "swapped on: status 9, says so" attach -d disk0
bounded 30 swapoff "${dev}p2"

modprobe loop
loop=$(losetup -f --show "$dev")
fails 9 "${loop##*/}|losetup|loop" "below a loop device: status 9, names it" attach -d disk0
losetup -d "$loop"

modprobe dm-mod
echo "0 2048 linear ${dev}p1 0" | dmsetup create held
fails 9 'held|dm-0' "below device-mapper: status 9, names it" attach -d disk0
dmsetup remove held

hold "$dev"
fails 9 "$holder|dd" "open: status 9, names the process" attach -d disk0
hold_plain=$holder
hold "${dev}p1"
fails 9 "$holder|$hold_plain|dd" "partition open: status 9" attach -d disk0
release
holder=$hold_plain
release

check "all that left it connected" connected "$name"
check "and sound" e2fsck -fn "${dev}p1"
check "detach, once nobody uses it" attach -d disk0
check "gone" disconnected "$name"
fails '[14]' disk0 "detach what is not attached" attach -d disk0
fails '[14]' nbd3 "detach a device that is not connected" attach -d /dev/nbd3

must "attach again" attached disk0
hold "$dev"
check "--force detaches it although open" attach -d --force disk0
release
check "gone by force" wait_for 5 disconnected "$name"
must "attach after that" attached disk0
check "works" dd if="$dev" of=/dev/null bs=64k count=1 iflag=direct status=none
check "dirty pages are written by detach" dd if=/usr/bin/bash of="$dev" bs=4k seek=8192 count=64 \
	conv=notrunc status=none
check "detach at last" attach -d disk0
check "they are in the file" cmp -n $((256 << 10)) -i 0:$((32 << 20)) /usr/bin/bash /srv/disk0.img
