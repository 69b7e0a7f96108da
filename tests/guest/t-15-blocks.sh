#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Block sizes, odd sizes, and an export that is a block device itself.
# deadline: 60
# takes: 10
# processors: 1
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

make_disk /srv/a.img 64Mi
truncate -s $(((8 << 20) + 1536)) /srv/odd.img
modprobe loop
truncate -s 32M /srv/backing.img
loop=$(losetup -f --show /srv/backing.img)
serve -e a raw file:/srv/a.img -e odd raw file:/srv/odd.img -e loop raw "file:$loop"

must "attach with 4096-byte blocks" attached --block-size 4096 a
check "the device has them" [ "$(blockdev --getss "$dev")" = 4096 ]
check "detach" attach -d a

must "attach a disk whose size is no multiple of 4096" attached odd
check "not a byte is lost" [ "$(blockdev --getsize64 "$dev")" = $(((8 << 20) + 1536)) ]
head -c 512 /dev/urandom >/tmp/last
check "its last block can be written" dd if=/tmp/last of="$dev" bs=512 seek=$(((8 << 11) + 2)) \
	oflag=direct conv=notrunc status=none
check "and is where it belongs" cmp /tmp/last <(tail -c 512 /srv/odd.img)
check "detach it" attach -d odd

must "attach an export that is a block device" attached loop
head -c 1M /dev/urandom >/tmp/data
check "write to it, and flush" dd if=/tmp/data of="$dev" bs=1M oflag=direct conv=notrunc,fsync \
	status=none
check "the data is there" cmp -n $((1 << 20)) /tmp/data /srv/backing.img
check "detach that" attach -d loop
stop
losetup -d "$loop"
