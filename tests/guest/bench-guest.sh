#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# The guest's half of bench: one file on tmpfs, served to /dev/nbdN by each server in turn, the same
# fio jobs on each. Says one "@@ result JSON" per server and job.
#
# SERVERS and JOBS are lists of names from the case statements below; RUNTIME is in milliseconds of the
# guest's clock, which under -icount counts instructions. Jobs of 1 MiB run twice as long: they do few.
set -eu -o pipefail

file=/tmp/disk.img
work=/run/bench
mkdir -p $work

wait_for() {	# SECONDS COMMAND...: until it succeeds
	local n=$(($1 * 20))
	shift
	until "$@"; do
		((n-- > 0)) || { echo "bench: gave up waiting for: $*"; return 1; }
		sleep 0.05
	done
}
connected() { [[ -e /sys/block/$1/pid && $(<"/sys/block/$1/size") != 0 ]]; }
unconnected() { ! [[ -e /sys/block/$1/pid ]]; }
listens() { [[ -S $1 ]]; }
listens_tcp() { (exec 4<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# up NAME sets dev; down NAME undoes it.
up() {
	case $1 in
	null_blk)
		modprobe null_blk nr_devices=1 gb=1 bs=512 irqmode=1 submit_queues=1 no_sched=1
		dev=nullb0
		return
		;;
	loop)
		dev=$(losetup -f --show $file)
		dev=${dev##*/}
		return
		;;
	nbdrs | nbdrs-epoll)
		flags=${NBDRSD_FLAGS:-}
		[[ $1 == nbdrs ]] || flags="$flags --io-engine=epoll"
		# shellcheck disable=SC2086 # flags are a list
		nbdrsd $flags -e bench raw file:$file --listen none \
			--control $work/control.sock >$work/nbdrsd.log 2>&1 &
		server=$!
		wait_for 20 nbdrsctl --control $work/control.sock status >/dev/null 2>&1
		dev=$(nbdrs-attach --control $work/control.sock bench)
		dev=${dev##*/}
		;;
	qemu-nbd)
		dev=nbd1
		qemu-nbd -f raw -c /dev/nbd1 $file &
		server=$!
		;;
	nbdkit-unix)
		dev=nbd2
		nbdkit -f -U $work/nbdkit.sock file $file &
		server=$!
		wait_for 10 listens $work/nbdkit.sock
		nbd-client -b 512 -unix $work/nbdkit.sock /dev/nbd2 >/dev/null
		;;
	nbd-server-tcp)
		dev=nbd3
		printf '%s\n' '[generic]' 'port = 10810' 'listenaddr = 127.0.0.1' \
			'[bench]' "exportname = $file" >$work/nbd-server.conf
		# Forks and leaves its pid: -d would end with the first connection.
		nbd-server -C $work/nbd-server.conf -p $work/nbd-server.pid
		wait_for 10 listens_tcp 10810
		server=$(<$work/nbd-server.pid)
		nbd-client -b 512 127.0.0.1 10810 -N bench /dev/nbd3 >/dev/null
		;;
	esac
	wait_for 10 connected "$dev"
	echo none >"/sys/block/$dev/queue/scheduler"
}
down() {
	case $1 in
	null_blk) rmmod null_blk; return ;;
	loop) losetup -d "/dev/$dev"; return ;;
	nbdrs*) nbdrs-attach --control $work/control.sock -d "/dev/$dev" ;;
	qemu-nbd) qemu-nbd -d "/dev/$dev" >/dev/null ;;
	*) nbd-client -d "/dev/$dev" ;;
	esac
	wait_for 10 unconnected "$dev"
	kill "$server" 2>/dev/null || :
	wait "$server" 2>/dev/null || :
}

job() {	# NAME DEVICE
	local args ms=$RUNTIME
	case $1 in *-1m-*) ms=$((2 * ms)) ;; esac
	case $1 in
	randread-4k-qd1) args='--rw=randread --bs=4k --iodepth=1' ;;
	randread-4k-qd32) args='--rw=randread --bs=4k --iodepth=32' ;;
	randwrite-4k-qd1) args='--rw=randwrite --bs=4k --iodepth=1' ;;
	randwrite-4k-qd32) args='--rw=randwrite --bs=4k --iodepth=32' ;;
	read-1m-qd4) args='--rw=read --bs=1M --iodepth=4' ;;
	write-1m-qd4) args='--rw=write --bs=1M --iodepth=4' ;;
	esac
	# shellcheck disable=SC2086 # flags are a list
	fio --name="$1" --filename="/dev/$2" $args --ioengine=libaio --direct=1 --time_based \
		--ramp_time=$((ms / 4))ms --runtime=${ms}ms --randseed=1 --norandommap --size=256M \
		--thread --output-format=json --output=$work/fio.json >/dev/null
	jq -c --arg job "$1" --arg server "$server_name" '.jobs[0] | (.read, .write) |
		select(.total_ios > 0) | { server: $server, job: $job, iops: .iops,
		bytes_per_s: .bw_bytes }' \
		$work/fio.json | sed 's/^/@@ result /'
}

modprobe nbd nbds_max=8 max_part=0
modprobe loop
dd if=/dev/zero of=$file bs=1M count=256 status=none
for server_name in $SERVERS; do
	up "$server_name"
	for j in $JOBS; do
		job "$j" "$dev"
	done
	down "$server_name"
done
