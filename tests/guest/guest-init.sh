#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# PID 1 of the guest: take what guest.py packed (a tar archive on the second disk), run it, leave.
#
# Everything the host reads goes out through one virtio port, opened once here and inherited as fd 3
# (a port takes one opener at a time). The end is always sysrq-b: an orderly power-off would sync,
# and a sync with a dead nbd disk about waits for ever. Nothing here is worth syncing: the root disk
# is a snapshot that qemu throws away.
[[ $$ == 1 ]] || { echo "guest-init.sh: not in the guest" >&2; exit 1; }
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb

leave() {
	echo b >/proc/sysrq-trigger
	sleep 60
}
trap leave EXIT

mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mkdir -p /dev/shm /run/lock
mount -t tmpfs shm /dev/shm
ln -s /proc/self/fd /dev/fd		# <(...) needs it
ip link set lo up
# Where QEMU's user network wants us; it shows the host's loopback as 10.0.2.2.
if grep -qs 0x0001 /sys/bus/virtio/devices/*/device && modprobe virtio_net; then
	ip addr add 10.0.2.15/24 dev eth0
	ip link set eth0 up
fi
# udev may not run: name the ports ourselves.
for p in /sys/class/virtio-ports/*; do
	[[ $(<"$p/name") == nbdrs.out ]] && port=/dev/${p##*/}
done
exec 3>"$port" >&3 2>&1 </dev/null
mkdir /run/guest
tar -xf /dev/vdb -C / || { echo "@@ broken cannot unpack the second disk"; exit 1; }
cd /run/guest || exit 1
# Another init takes over, with the machine as it is now; the port is for what it runs.
if [[ -e init ]]; then
	exec 3>&- >/dev/console 2>&1
	exec bash init
fi
# shellcheck source=/dev/null
. /run/guest/env
echo "@@ booted $(uname -r) $(cut -d' ' -f1 /proc/uptime)"
bash /run/guest/main.sh
echo "@@ done $?"
