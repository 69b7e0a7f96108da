#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# steps.sh - the main job, step by step: serve DISK, attach it, make a file system, write, verify,
# detach. demo.sh runs it on this machine, or in a guest where this kernel has no nbd module.
#
#	DISK	the volume (made already)
#	WORK	an empty folder for the control socket, the mount point and the daemon's log
#	COLOR	not empty: highlight
#
# Every step shows the command it runs. When one fails, or on an interrupt, what was set up is taken
# down again and the daemon's log is shown.
set -eu -o pipefail

control=$WORK/control.sock
mount=$WORK/mnt
log=$WORK/nbdrsd.log
daemon=
dev=
mounted=
done=

bold=${COLOR:+$'\e[1m'} dim=${COLOR:+$'\e[2m'} off=${COLOR:+$'\e[0m'}
step=0
steps=10

# title TEXT COMMAND-TEXT: announce a step.
title() {
	step=$((step + 1))
	printf '%s[%2d/%d] %s%s\n' "$bold" $step $steps "$1" "$off"
	[[ -z ${2:-} ]] || printf '        %s$ %s%s\n' "$dim" "$2" "$off"
	begun=${EPOCHREALTIME/./}
}
# finish [TEXT]: it is done.
finish() {
	local ms=$(((${EPOCHREALTIME/./} - begun) / 1000))
	printf '        %s (%d.%d s)\n' "${1:-done}" $((ms / 1000)) $((ms % 1000 / 100))
}

# Never hangs: umount and detach get a limit each, and the daemon is killed last.
cleanup() {
	local status=$?
	trap - EXIT INT TERM HUP
	[[ -z $mounted ]] || timeout 20 umount "$mount" || :
	[[ -z $dev ]] || timeout 30 nbdrs-attach --control "$control" -d --force "$dev" || :
	if [[ -n $daemon ]] && kill -0 "$daemon" 2>/dev/null; then
		kill "$daemon"
		for _ in {1..50}; do
			kill -0 "$daemon" 2>/dev/null || break
			sleep 0.1
		done
		kill -KILL "$daemon" 2>/dev/null || :
	fi
	if [[ -z $done ]]; then
		[[ $status != 0 ]] || status=1
		echo "The demo stopped in step $step of $steps (status $status)." >&2
		if [[ -s $log ]]; then
			echo "nbdrsd said:" >&2
			tail -n 20 "$log" >&2
		fi
	fi
	exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

mkdir -p "$mount"

title "serve it" "nbdrsd -e disk0 raw file:$DISK --listen none --control $control"
nbdrsd -e disk0 raw "file:$DISK" --listen none --control "$control" >"$log" 2>&1 &
daemon=$!
for _ in {1..300}; do
	nbdrsctl --control "$control" status >/dev/null 2>&1 && break
	kill -0 "$daemon" 2>/dev/null || exit 1
	sleep 0.1
done
nbdrsctl --control "$control" status >/dev/null
finish "nbdrsd runs, process $daemon"

title "use it as a block device" "nbdrs-attach disk0"
dev=$(nbdrs-attach --control "$control" disk0)
finish "$dev, $(blockdev --getsize64 "$dev") bytes, ready for use"

title "make a file system" "mkfs.ext4 $dev"
mkfs.ext4 -q "$dev"
finish

title "mount it" "mount $dev $mount"
mount "$dev" "$mount"
mounted=yes
finish "$(df -h --output=avail "$mount" | tail -n 1 | tr -d ' ') free"

title "write files" "head -c 16M /dev/urandom >files/random; split -b 512k files/random files/part-"
mkdir "$mount/files"
head -c 16M /dev/urandom >"$mount/files/random"
split -b 512k "$mount/files/random" "$mount/files/part-"
(cd "$mount/files" && sha256sum -- * >../SHA256SUMS)
sync -f "$mount"
finish "$(wc -l <"$mount/SHA256SUMS") files, $(du -sh "$mount/files" | cut -f1)"

title "umount, mount, and verify every file" "sha256sum -c SHA256SUMS"
umount "$mount"
mounted=
mount "$dev" "$mount"
mounted=yes
(cd "$mount/files" && sha256sum --quiet -c ../SHA256SUMS)
finish "all checksums agree"

title "what the daemon counted" "nbdrsctl status"
nbdrsctl --control "$control" status | sed 's/^/        /'
finish

title "check the file system" "umount $mount; fsck.ext4 -fn $dev"
umount "$mount"
mounted=
e2fsck -fn "$dev" >"$WORK/fsck.log" 2>&1 || { cat "$WORK/fsck.log"; exit 1; }
finish "clean"

title "detach" "nbdrs-attach -d $dev"
nbdrs-attach --control "$control" -d "$dev"
dev_was=$dev
dev=
finish "$dev_was is free again"

title "stop the daemon" "kill $daemon"
kill "$daemon"
wait "$daemon"
daemon=
done=yes
finish "it ended with status 0"
