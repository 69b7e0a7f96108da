#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# nbdrsctl resize: the volume and its live device, under a mounted file system and under load; refused where it would
# hang or cut; done again after it was interrupted between the two.
# deadline: 150
# deadline full: 900
# takes: 30
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

make_disk /srv/disk0.img 64Mi
make_disk /srv/disk1.img 64Mi
nbdrsd init --size 64Mi sharded file:/srv/shards/
exports=(-e disk0 raw file:/srv/disk0.img -e disk1 raw file:/srv/disk1.img -e shards sharded file:/srv/shards/)
serve "${exports[@]}"
start_udevd
mib() { echo $(($(blockdev --getsize64 "$1") >> 20)); }
resize() { bounded 60 nbdrsctl --control $CTL resize "$@"; }

must "attach with 2 connections" attached -C 2 disk0 /dev/nbd1
mkfs.ext4 -q -b 4096 -E lazy_itable_init=0,lazy_journal_init=0 /dev/nbd1	# or it writes when the daemon is killed
mount /dev/nbd1 /mnt
head -c 20M /dev/urandom >/mnt/before
sum=$(sha256sum </mnt/before)

must "it grows under the file system" resize disk0 160Mi
check "the volume has its size" [ "$(stat -c %s /srv/disk0.img)" = $((160 << 20)) ]
check "so has the device" [ "$(mib /dev/nbd1)" = 160 ]
check "resize2fs, mounted" bounded 60 resize2fs /dev/nbd1
check "there is more room" [ "$(df --output=size -BM /mnt | tail -n 1 | tr -dc 0-9)" -ge 130 ]
check "it can be written to" dd if=/dev/urandom of=/mnt/more bs=1M count=100 oflag=direct status=none
fails 1 -- "smaller needs --shrink" resize disk0 32Mi
check "and nothing has changed" [ "$(mib /dev/nbd1) $(stat -c %s /srv/disk0.img)" = "160 $((160 << 20))" ]
check "a new attach is of the new size" [ "$(nbdrs-attach -l --json | jq '.devices[0].size')" = $((160 << 20)) ]

# Interrupted between volume and device: the kernel does not listen to who has no CAP_SYS_ADMIN.
fails 7 'do it again' "without privileges the device stays as it is: status 7" \
	setpriv --bounding-set=-sys_admin nbdrsctl --control $CTL resize disk0 200Mi
check "the volume is ahead of its device" [ "$(mib /dev/nbd1) $(stat -c %s /srv/disk0.img)" = "160 $((200 << 20))" ]
check "the file system does not mind" [ "$(sha256sum </mnt/before)" = "$sum" ]
# Killed then, the next one has a larger volume than the device, which is still that volume's.
bounded 30 sync -f /mnt
kill -KILL "$daemon"
wait "$daemon" || :
serve "${exports[@]}"
state() { nbdrs-attach --control $CTL -l --json | jq -r '.devices[0].state'; }
is() { [ "$(state)" = "$1" ]; }
must "a daemon that died between the two finds its device" wait_for 20 is live
check "done again it is done" resize disk0 200Mi
check "the device has caught up" [ "$(mib /dev/nbd1)" = 200 ]
bounded 30 umount /mnt
check "fsck finds nothing" e2fsck -fn /dev/nbd1

check "smaller again, with --shrink" resize --shrink disk0 160Mi
check "volume and device" [ "$(mib /dev/nbd1) $(stat -c %s /srv/disk0.img)" = "160 $((160 << 20))" ]
mount /dev/nbd1 /mnt
check "all is there" [ "$(sha256sum </mnt/before)" = "$sum" ]
bounded 30 umount /mnt

# Under load, checked by fio.
rounds=${NBDRS_FULL:+50}
rounds=${rounds:-8}
must "attach two more" attached -C 4 shards /dev/nbd2
must "attach two more, the other" attached disk1 /dev/nbd3
# An attach that needed a second try has cut off udev's reads.
# shellcheck disable=SC2034 # used below, by eval
lines=$(dmesg | wc -l)
for d in nbd2 nbd3; do
	fio --name=$d --filename=/dev/$d --size=32M --rw=randwrite --bs=4k --iodepth=16 --ioengine=libaio --direct=1 \
		--loops=1000 --verify=crc32c --verify_fatal=1 --verify_backlog=256 --do_verify=1 >/tmp/$d.fio 2>&1 &
done
busy() { [[ $(cut -d' ' -f9 "/sys/block/$1/inflight" 2>/dev/null; awk '{ print $1 + $5 }' "/sys/block/$1/stat") != 0 ]]; }
wait_for 20 busy nbd2 && wait_for 20 busy nbd3
ok=true
for n in $(seq "$rounds"); do
	size=$((64 + n * 7 % 40))
	resize --shrink shards ${size}Mi >/dev/null && resize --shrink disk1 ${size}Mi >/dev/null || ok=false
	[[ $(mib /dev/nbd2) == "$size" && $(mib /dev/nbd3) == "$size" ]] || { echo "round $n: not $size MiB"; ok=false; }
done
check "$rounds resizes of two devices under load" $ok
check "fio still runs on both" [ "$(pgrep -xc fio)" -ge 2 ]
pkill -INT -x fio
if ! check "fio ends" wait_for 60 eval '! pgrep -x fio >/dev/null'; then
	grep -H . /proc/[0-9]*/comm | sed -n 's|/comm:fio$||p' | while read -r p; do
		head -c 300 "$p/task"/*/stat "$p/task"/*/wchan "$p/task"/*/stack 2>/dev/null
	done
	grep -H . /sys/block/nbd[23]/inflight
	cat /tmp/nbd[23].fio
	run ctl status
fi
check "fio has read what it wrote" eval '! grep -E "verify: bad|err= *[1-9]|Input/output" /tmp/nbd2.fio /tmp/nbd3.fio'
check "no I/O error" eval '! dmesg | tail -n +$((lines + 1)) | grep -E "I/O error"'

# Partitions: the new end can be used.
printf 'label: dos\n,20M\n' | sfdisk -q /dev/nbd3
resize disk1 150Mi >/dev/null
check "a partition can reach to the new end" eval 'echo ", 140M" | sfdisk -q -N1 /dev/nbd3 && udevadm settle && [[ $(cat /sys/block/nbd3/nbd3p1/size) == $((140 << 11)) ]]'

for e in disk0 shards disk1; do
	attach -d $e
done
# A device whose connections are dead: the kernel would wait, and everything behind it.
must "attach, to be cut off" attached --dead-conn-timeout 60 disk0 /dev/nbd1
stop KILL || :
serve_unprivileged -e disk0 raw file:/srv/disk0.img	# so that it does not mend
begun=$SECONDS
fails 1 'is dead.*attach it again' "refused while a connection is dead" resize disk0 300Mi
check "at once" [ $((SECONDS - begun)) -le $((5 * SLOW)) ]
stop
serve -e disk0 raw file:/srv/disk1.img
fails 1 'not the one served here' "refused when the device is another volume's" resize disk0 300Mi
check "nothing was changed" [ "$(stat -c %s /srv/disk[01].img | tr '\n' ' ')$(cat /sys/block/nbd1/size)" = "$((160 << 20)) $((150 << 20)) $((160 << 11))" ]
run attach -d --force /dev/nbd1
check "it can be got rid of" wait_for 15 disconnected nbd1
