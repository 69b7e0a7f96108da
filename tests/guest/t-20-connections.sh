#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Four connections, used from four processors at once.
# deadline: 90
# takes: 32
# processors: 4
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

make_disk /srv/disk0.img 256Mi
serve -e disk0 raw file:/srv/disk0.img
must "attach with 4 connections" attached -C 4 disk0
check "the kernel has 4 queues" [ "$(ls "/sys/block/$name/mq" | wc -l)" = 4 ]
check "the daemon counts 4 connections" [ "$(nbdrsctl --control $CTL status --json |
	jq '[.. | objects | select(.name? == "disk0") | .connections] | first')" = 4 ]
# Job n stays on processor n, so every queue and socket carries requests; regions do not overlap.
check "fio verifies 4 jobs, each through a connection of its own" fio --name=verify \
	--filename="$dev" --rw=randrw --bsrange=512-128k --blockalign=512 --size=4M --offset_increment=32M \
	--numjobs=4 --cpus_allowed=0-3 --cpus_allowed_policy=split --ioengine=libaio --iodepth=16 \
	--direct=1 --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=11 --output-format=terse \
	--output=/tmp/fio.out
# What one connection wrote another reads, after a flush and without.
head -c 1M /dev/urandom >/tmp/data
ok=true
for cpu in 0 1 2 3; do
	taskset -c $cpu dd if=/tmp/data of="$dev" bs=256k seek=$((cpu * 4)) oflag=direct conv=notrunc \
		status=none
	for other in 0 1 2 3; do
		taskset -c $other dd if="$dev" bs=256k skip=$((cpu * 4)) count=4 iflag=direct \
			status=none | cmp - /tmp/data || ok=false
	done
done
check "what is written through one is read through all" $ok
mkfs.ext4 -q "$dev"
mount "$dev" /mnt
copies=
for cpu in 0 1 2 3; do
	taskset -c $cpu cp /tmp/data /mnt/$cpu &
	copies="$copies $!"
done
# shellcheck disable=SC2086 # a list
wait $copies
bounded 30 umount /mnt
check "fsck finds nothing" e2fsck -fn "$dev"
check "detach" attach -d "$dev"
stop
check "the file system in the file is sound" e2fsck -fn /srv/disk0.img

serve -e disk0 raw file:/srv/disk0.img
fails 2 . "0 connections are refused" attach -C 0 disk0
fails 2 . "65 connections are refused" attach -C 65 disk0
stop

# The first read stalls, as when one connection gets no receiver in the kernel.
serve -e disk0 raw "delay[read=$((6 * SLOW))s,count=1]:file:/srv/disk0.img"
must "attached all the same" attached -C 2 disk0
check "by a second try" said 0 "a connection does not answer; attaching anew"
check "and usable" dd if="$dev" of=/dev/null bs=4k count=1 iflag=direct status=none
check "detach again" attach -d "$dev"
