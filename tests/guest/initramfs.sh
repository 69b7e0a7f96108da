#!/bin/busybox sh
# shellcheck shell=dash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# /init of the guest's initramfs: load the virtio modules, mount the root disk, go on there.
busybox=/bin/busybox
$busybox mount -t proc proc /proc
$busybox mount -t sysfs sysfs /sys
$busybox mount -t devtmpfs dev /dev
for m in /modules/*.ko; do
	$busybox insmod "$m"
done
n=0
until $busybox mount -t ext4 -o noatime,noinit_itable /dev/vda /root 2>/dev/null; do
	n=$((n + 1))
	if [ $n -ge 600 ]; then
		echo "guest: no root disk after 60 s" >/dev/console
		$busybox reboot -f
	fi
	$busybox usleep 100000
done
$busybox mount --move /proc /root/proc
$busybox mount --move /sys /root/sys
$busybox mount --move /dev /root/dev
exec $busybox switch_root /root /sbin/guest-init
