#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# ext4 on a volume in S3, behind a write-back cache whose journal is on a disk here. The daemon is killed while
# everything is synced; or the power goes, as far as the disk is concerned: the journal's disk keeps what it was told to
# sync, all that was in memory is gone. Each time all that was synced has to be there, and the file system sound.
# NBDRS_FULL=1: 20 kills and 20 power cuts for each place of the cache.
# deadline: 180
# deadline full: 3600
# takes: 25
# needs: s3
# kernel log may say: Possible stuck request
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

SLOTS=16
BLOCK=4096

# --- what is written -----------------------------------------------------------------------------
# A keeper makes a file, and writes a block of its file of slots anew, over and over; it notes each in /tmp (which
# survives) when it is synced. Contents say where they belong: file N has blocks "N.0", "N.1" ..., a slot its last N.

keeper() {	# ITS-NUMBER
	local home=/mnt/disk/keep.$1 noted=/tmp/noted.$1 n i block data
	n=$(tail -n 1 "$noted")
	until [[ -e /tmp/enough ]]; do
		((++n))
		data=
		for ((i = 0; i <= n % 5; i++)); do
			printf -v block "%${BLOCK}s" "$n.$i"
			data+=$block
		done
		printf %s "$data" >"$home/$n" && sync "$home/$n" || return 0
		printf "%${BLOCK}s" "$n" | dd of="$home/slots" bs=$BLOCK seek=$((n % SLOTS)) conv=notrunc,fsync status=none || return 0
		echo "$n" >>"$noted"
	done
}

keepers_start() {
	rm -f /tmp/enough
	before=$(noted)
	keeper 0 2>/dev/null &
	keepers=$!
	keeper 1 2>/dev/null &
	keepers+=" $!"
	wait_for 30 more_noted 4
}
noted() { cat /tmp/noted.? | wc -l; }
more_noted() { (($(noted) >= before + $1)); }
keepers_end() {
	local k
	touch /tmp/enough
	for k in $keepers; do
		wait_for 60 ended "$k" || { echo "a writer hangs"; return 1; }
		wait "$k" || :
	done
}

# intact: all that was noted is there, whole. One process: each costs an emulated processor a lot.
intact() {
	local k
	for k in 0 1; do
		awk -v home=/mnt/disk/keep.$k -v slots=$SLOTS -v size=$BLOCK '
			function is(text, at, want) { return substr(text, at * size + 1, size) == sprintf("%" size "s", want) }
			function wrong(what) { print home ": " what; bad = 1; exit 1 }
			BEGIN { RS = "\001" }
			{
				count = split($0, numbers, "\n")
				for (k = 1; k < count; k++) {
					n = numbers[k]
					if (n == 0)
						continue
					last[n % slots] = n
					text = ""
					getline text <(home "/" n)
					close(home "/" n)
					if (length(text) != (n % 5 + 1) * size)
						wrong("file " n " of " numbers[count - 1] " has " length(text) " bytes")
					for (i = 0; i <= n % 5; i++)
						if (!is(text, i, n "." i))
							wrong("file " n " of " numbers[count - 1] ", block " i)
				}
				text = ""
				getline text <(home "/slots")
				for (s = 0; s < slots; s++) {
					v = substr(text, s * size + 1, size) + 0
					if (v < last[s] || !is(text, s, v) || v && v % slots != s)
						wrong("slot " s " has " v ", and " last[s] + 0 " was synced")
				}
			}' /tmp/noted.$k || return 1
	done
}

# --- the journal's disk --------------------------------------------------------------------------

disk_make() {
	export DM_DISABLE_UDEV=1	# there is none: dmsetup makes its nodes itself
	modprobe -a loop dm_mod
	truncate -s 64M /srv/journal.img
	loop=$(losetup -f --show /srv/journal.img)
	dmsetup create journal --table "0 131072 linear $loop 0"
	mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/mapper/journal
	mkdir -p /mnt/cache /mnt/disk
	mount /dev/mapper/journal /mnt/cache
}
# disk_becomes TARGET...: nothing that waits in memory is written first.
disk_becomes() {
	dmsetup suspend --noflush --nolockfs journal && dmsetup load journal --table "0 131072 $*" && dmsetup resume journal
}
disk_cut() { disk_becomes error; }
disk_back() {
	umount /mnt/cache && disk_becomes linear "$loop" 0 && mount /dev/mapper/journal /mnt/cache
}

# --- rounds --------------------------------------------------------------------------------------

start() { serve -e disk0 "$driver" "$conn"; }
die() {
	kill -KILL "$daemon"
	wait "$daemon" || :
}

# sound: nothing comes from a cache of the kernel's. What was noted is there, and fsck finds nothing.
sound() {
	mountpoint -q /mnt/disk || mount "$dev" /mnt/disk || return 1
	bounded 60 umount /mnt/disk && blockdev --flushbufs "$dev" && e2fsck -fn "$dev" && mount "$dev" /mnt/disk && intact
}

round_kill() {
	keepers_start || { echo "nothing is written"; return 1; }
	nap 0.$((RANDOM % 6))
	die
	start || return 1
	before=$(noted)
	wait_for 60 more_noted 4 || { echo "writers do not go on"; return 1; }
	keepers_end && sound
}

round_cut() {
	keepers_start || { echo "nothing is written"; return 1; }
	nap 0.$((RANDOM % 6))
	die
	disk_cut
	# What the kernel has in memory for the volume is lost, too. (10: it says so.)
	run attach -d --force --wait 1 "$dev"
	((rc == 0 || rc == 10)) || { echo "detach: status $rc, $err"; return 1; }
	keepers_end && bounded 60 umount /mnt/disk && disk_back || return 1
	start && attached disk0 && sound
}

rounds() {	# KIND N
	local i
	for ((i = 0; i < $2; i++)); do
		"round_$1" || { echo "round $i of $1"; return 1; }
	done
}

# --- both places ---------------------------------------------------------------------------------

behind_cache() {	# WORD DRIVER CONN STORE-DRIVER STORE-CONN
	local k i begun=$SECONDS
	driver=$2
	conn=$3
	must "$1: init" nbdrsd init --size 64Mi "$4" "$5"
	must "$1: serve" start
	must "$1: attach" attached disk0
	mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 "$dev"
	mount "$dev" /mnt/disk
	for k in 0 1; do
		mkdir /mnt/disk/keep.$k
		for ((i = 0; i < SLOTS; i++)); do
			printf "%${BLOCK}s" 0
		done >/mnt/disk/keep.$k/slots
		echo 0 >/tmp/noted.$k
	done
	# A kill in the midst of it.
	fio --name=data --filename=/mnt/disk/data --size=4M --bs=16k --rw=randwrite --fsync=8 --verify=crc32c --do_verify=1 \
		--direct=1 --ioengine=libaio --iodepth=4 --output=/tmp/fio.out &
	fio=$!
	wait_for 20 test -s /mnt/disk/data
	die
	must "$1: serve again" start
	check "$1: fio goes on" wait_for 60 ended $fio
	check "$1: writes and verifies" wait $fio
	sync -f /mnt/disk
	sum=$(sha256sum </mnt/disk/data)
	((kills == 0)) || must "$1: $kills times kill -9 of the daemon: what was synced is there" rounds kill "$kills"
	must "$1: $cuts power cuts: the same" rounds cut "$cuts"
	echo "@@ note $1: $kills kills, $cuts power cuts, $(noted) times synced and checked, $((SECONDS - begun)) s"
	check "$1: fio's file is as it was" [ "$(sha256sum </mnt/disk/data)" = "$sum" ]
	check "$1: umount" bounded 60 umount /mnt/disk
	check "$1: detach" attach -d disk0
	check "$1: the daemon ends with status 0" stop

	# A cache of whole objects in memory, to be quick.
	serve -r -e disk0 "$4:cache[granule=256Ki]" "$5"
	must "$1: attach what is in the store" attached disk0
	check "$1: fsck finds nothing" e2fsck -fn "$dev"
	mount -o ro "$dev" /mnt/disk
	check "$1: all that was synced is in the store" intact
	check "$1: and fio's file" [ "$(sha256sum </mnt/disk/data)" = "$sum" ]
	umount /mnt/disk
	attach -d disk0
	stop
}

kills=1 cuts=1
[[ -z ${NBDRS_FULL:-} ]] || kills=20 cuts=20
disk_make
cache='cache[disk=/mnt/cache/disk0,size=16Mi,mode=writeback,lag=500ms]'
shards='sharded[size=256Ki]'
s3=s3:$GUEST_S3
behind_cache "below the mapping" "$shards" "$cache:$s3/below/" "$shards" "$s3/below/"
# It has been killed under fio by then.
[[ ${NBDRS_FULL:-} ]] || kills=0
behind_cache "above the mapping" "$cache" "$shards:$s3/above/" "$shards" "$s3/above/"
