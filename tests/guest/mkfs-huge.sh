# SPDX-License-Identifier: GPL-3.0-or-later
# shellcheck shell=bash
#
# mkfs-huge.sh - a test's part, and the whole of what mkfs-16t runs: a file system on a huge sharded disk whose store
# is 50 ms away, and the disk discarded. For scripts that have read lib.sh.

# since MICROSECONDS: seconds.
since() { awk -v t=$((${EPOCHREALTIME/./} - $1)) 'BEGIN { printf "%.1f", t / 1e6 }'; }
requests() {	# of all kinds, to the store
	nbdrsctl --control $CTL status --json | jq '[.exports[0].layers[] | select(.name == "s3") | .state |
		to_entries[] | select(.key | test("^[A-Z]+ ")) | .value | tonumber] | add // 0'
}
kinds() {
	nbdrsctl --control $CTL status --json | jq -r '[.exports[0].layers[] | select(.name == "s3") | .state |
		to_entries[] | select(.key | test("^[A-Z]+ ")) | "\(.key): \(.value)"] | join(", ")'
}
step() {	# WHAT COMMAND...: run it, say how long it took and what it asked of the store
	local what=$1 begun=${EPOCHREALTIME/./} before
	shift
	before=$(requests)
	"$@" || return 1
	sync "$dev" || return 1
	echo "@@ note $what: $(since "$begun") s, $(($(requests) - before)) requests to the store"
}

# mkfs_huge SIZE CONN [FS-SIZE]: the file system may be smaller than the disk.
mkfs_huge() {
	local far='delay[read=50ms,write=50ms,zero=50ms,trim=50ms]'
	nbdrsd init --size "$1" sharded "$2" || return 1
	serve -e huge "sharded:$far" "$2" || return 1
	attached huge || return 1
	# shellcheck disable=SC2086 # nothing, or one word
	step "mkfs.ext4, ${3:-$1}" mkfs.ext4 -q "$dev" ${3:-} || return 1
	e2fsck -n "$dev" || return 1	# clean: only the superblock and the journal are looked at
	step "blkdiscard of $1" blkdiscard -f "$dev" || return 1
	step "blkdiscard of $1, empty" blkdiscard -f "$dev" || return 1
	kinds
	attach -d huge && stop
}
