#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# demo.sh - what `make demo` shows: a 1 GiB disk in ./demo, served by nbdrsd, used as a block device
# of the kernel (steps.sh), and how to go on from there.
#
# Where this machine's kernel has the nbd module, that happens right here, as root. Where it has not,
# it happens in a small guest - Debian's kernel under QEMU - to which ./demo/disk0.img is handed as a
# disk; what was written is then checked in the file, here.
#
#	BUILD		where the programs are (default build)
#	NBDRS_DEMO	here or guest: do not choose by yourself
set -eu -o pipefail
cd "$(dirname "$0")/../.."
top=$PWD
build=${BUILD:-build}
[[ $build == /* ]] || build=$top/$build
export PATH=$build:$PATH:/usr/sbin:/sbin
disk=$top/demo/disk0.img
COLOR=
[[ ! -t 1 ]] || COLOR=yes
export COLOR

fail() {
	echo "demo: $*" >&2
	exit 1
}

for program in nbdrsd nbdrs-attach nbdrsctl; do
	[[ -x $build/$program ]] || fail "$build/$program is missing (run: make)"
done

# --- where ---------------------------------------------------------------------------------------
where=${NBDRS_DEMO:-}
case $where in
here | guest) reason="NBDRS_DEMO=$where" ;;
'')
	if [[ ! -e /sys/module/nbd ]] && ! modprobe -n -q nbd 2>/dev/null; then
		where=guest reason="this kernel ($(uname -r)) has no nbd module"
	elif [[ $(id -u) != 0 ]]; then
		where=guest reason="attaching here needs root (sudo make demo)"
	elif ! modprobe nbd 2>/dev/null; then
		where=guest reason="this kernel's nbd module cannot be loaded"
	else
		where=here reason="this kernel has the nbd module"
	fi
	;;
*) fail "NBDRS_DEMO=$where: must be here or guest" ;;
esac

# --- the volume ----------------------------------------------------------------------------------
mkdir -p demo
if [[ -e $disk ]]; then
	echo "A disk of an earlier demo is there; it is made anew."
fi
echo "Make a volume of 1 GiB:"
echo "        \$ nbdrsd init --size 1Gi raw file:demo/disk0.img"
nbdrsd init --force --size 1Gi raw "file:$disk"
echo "        $(stat -c '%s bytes, %b blocks allocated' "$disk")"

work=$(mktemp -d "${TMPDIR:-/tmp}/nbdrs-demo.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if [[ $where == here ]]; then
	echo "The rest happens on this machine: $reason."
	DISK=$disk WORK=$work bash tests/demo/steps.sh
else
	echo "The rest happens in a small guest (QEMU, no acceleration needed): $reason."
	echo "demo/disk0.img is its third disk, /dev/vdc, and nbdrsd serves that. Booting ..."
	/usr/bin/python3 tests/guest/boot --disk "$disk" --log "$build/demo-guest.log" --seconds 150 \
		DISK=/dev/vdc WORK=/run/demo COLOR=$COLOR tests/demo/steps.sh
fi

# --- what is in the file -------------------------------------------------------------------------
echo "Look into the file itself, without nbdrs:"
echo "        \$ fsck.ext4 -fn demo/disk0.img"
e2fsck -fn "$disk" >"$work/fsck.log" 2>&1 || { cat "$work/fsck.log"; fail "the file system is damaged"; }
echo "        clean"
echo "        \$ debugfs -R 'dump files/random ...' demo/disk0.img | sha256sum"
debugfs -R 'cat SHA256SUMS' "$disk" 2>/dev/null >"$work/sums"
debugfs -R "dump files/random $work/random" "$disk" 2>/dev/null
(cd "$work" && grep -E ' random$' sums | sha256sum --quiet -c -) || fail "files/random differs"
echo "        the same bytes as were written to the device"

cat <<EOF

Done. nbdrsd served a volume, the kernel used it as a disk, and all that was written is in
demo/disk0.img ($(du -h "$disk" | cut -f1) of 1 GiB allocated).
EOF
[[ $where == here ]] || echo "Transcript of the guest: ${build#"$top"/}/demo-guest.log"
cat <<EOF

Go on (programs are in ${build#"$top"/}/; \`sudo make install\` puts them into your PATH):
  serve it to other programs   nbdrsd -e disk0 raw file:demo/disk0.img
  ... and look at it           qemu-img info nbd:127.0.0.1:10809:exportname=disk0
  use it as a device (root,    nbdrs-attach disk0
    nbd module needed)         mount /dev/nbdrs/disk0 /mnt
  see what is going on         nbdrs-attach -l;  nbdrsctl status
  detach                       umount /mnt && nbdrs-attach -d disk0
Remove the disk: rm -r demo
EOF
