# SPDX-License-Identifier: GPL-3.0-or-later
# shellcheck shell=bash
#
# survive.sh - for tests that end the daemon under load: what happens to a file system meanwhile.
#
#	survive KIND CONNECTIONS OPTION...	all of it: attach, load, `rounds` times what the test calls `strike`, and
#				every check that has nothing to do with how the daemon ended. `found`, the test's, is called
#				when the load has ended, for the others
#	strike			of the test: ends the daemon and has another one serve, the same volumes; false = in vain
#	rounds			how many to do: a few, or 100 with NBDRS_FULL=1
#	load_start		fio on the file system in /mnt, in the background: writes, reads back, verifies
#	mark			the daemon is back, now
#	load_stop		ends it; what was found in the variables below
#
# load_ok (true or false), load_ios, load_p99 and load_worst (ms a request took, from sending to the answer), and
# load_after: ms from the last mark before its answer, of the requests that were sent before that mark. So
# load_after is the time that passed after the daemon was back.

rounds=${1:-3}
[[ -z ${NBDRS_FULL:-} ]] || rounds=100

now_ms() { echo "${EPOCHREALTIME/./}" | sed 's/...$//'; }
mark() { now_ms >>/tmp/marks; }

load_start() {
	rm -rf /tmp/load
	mkdir /tmp/load
	: >/tmp/marks
	# The log has a line for each request: when it was answered (ms) and how long it took (ns).
	# Small, in memory; verified 32 writes later, past every cache.
	fio --name=load --directory=/mnt --size=8M --rw=randwrite --bsrange=4k-32k --ioengine=libaio \
		--iodepth=4 --direct=1 --fsync=16 --verify=crc32c --verify_backlog=32 --verify_fatal=1 \
		--time_based --runtime=7200 --numjobs=2 --thinktime=2000 --write_lat_log=/tmp/load/log --log_unix_epoch=1 \
		--output-format=json --output=/tmp/load/json >/tmp/load/err 2>&1 &
	load=$!
	wait_for 20 test -s /mnt/load.0.0 && wait_for 20 test -s /mnt/load.1.0
}

load_stop() {
	kill -INT $load
	wait_for 60 ended $load || { echo "fio does not end"; cat /tmp/load/err; return 1; }
	wait $load || :		# 128: by a signal
	load_ok=$(jq -r '[.jobs[].error] | max == 0' <(sed -n '/^{/,$p' /tmp/load/json))
	[[ $load_ok == true ]] || cat /tmp/load/err /tmp/load/json
	cat /tmp/load/log_clat*.log | awk -F', *' '
		BEGIN { while ((getline t <"/tmp/marks") > 0) mark[n++] = t }
		{
			ms = $2 / 1e6
			print ms
			for (i = 0; i < n; i++)
				if ($1 >= mark[i] && $1 - ms <= mark[i] && (i + 1 == n || $1 < mark[i + 1]) && $1 - mark[i] > after)
					after = $1 - mark[i]
		}
		END { print int(after) >"/tmp/load/after" }' | sort -n >/tmp/load/sorted
	# shellcheck disable=SC2034 # for the caller
	read -r load_ios load_p99 load_worst < <(awk '
		{ v[NR] = $1 }
		END { k = int(NR * 0.99); print NR, int(v[k < 1 ? 1 : k]), int(v[NR]) }' /tmp/load/sorted)
	# shellcheck disable=SC2034 # for the caller
	load_after=$(</tmp/load/after)
}

serve_disk() { serve -e disk0 raw file:/srv/disk0.img; }

survive() {
	local kind=$1 n=$2 i
	shift 2
	make_disk /srv/disk0.img 64Mi
	serve_disk
	must "attach with $n connections $*" attached -C "$n" "$@" disk0
	mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 "$dev"
	mount "$dev" /mnt
	must "the load runs" load_start
	for ((i = 0; i < rounds; i++)); do
		nap 0.$((RANDOM % 5 + 2))
		# Nothing here may touch the file system: it may have to wait for the daemon that is started next.
		strike || break
		mark
		echo "round $i" >/mnt/round
		bounded 30 sync -f /mnt || break
	done
	check "$rounds rounds: all have been lived through" [ $i = $rounds ]
	must "the load ends" load_stop
	check "no request failed, all that was read back is right" [ "$load_ok" = true ]
	echo "@@ note $kind, $n connections: $rounds rounds, $load_ios requests, p99 $load_p99 ms, worst $load_worst ms, after the new daemon was up $load_after ms"
	found
	check "no I/O error in the kernel's log" eval '! dmesg | grep -E "I/O error|EXT4-fs error|Buffer I/O"'
	check "unmount" bounded 60 umount /mnt
	check "detach: nothing was lost" attach -d disk0
	stop
	check "fsck finds nothing" e2fsck -fn /srv/disk0.img
	rm /srv/disk0.img
}
