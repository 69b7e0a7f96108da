#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
#
# kernel.sh - fetch and unpack the Debian cloud kernel that the guest boots.
#
# Prints one line: the folder that holds
#	vmlinux or vmlinuz	what qemu's -kernel takes (the ELF file boots through PVH and skips
#				the decompressor, which TCG makes slow; bzImage is the fallback)
#	initramfs		busybox and the virtio modules, enough to find and mount the root disk
#	lib/modules/RELEASE	every module of $modules with its dependencies, depmod already run
#	release			the kernel's release, one line
#
# The folder is a cache entry named by a hash of the package version and of the files that made it,
# so a new kernel or an edited script makes a new entry and nothing needs to be invalidated.
#
#	NBDRS_CACHE		where to cache (default ~/.cache/nbdrs; build/ when that cannot be written)
#	NBDRS_GUEST_KERNEL	another kernel: a package's name, or the path of a .deb
#
# Exit: 0; 77 something this machine lacks, named on stderr; 1 anything else.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/guest/cache.sh
. "$here/cache.sh"

meta=linux-image-cloud-amd64
# What the initramfs loads, in this order (dependencies are put in between).
boot_modules='virtio_pci virtio_blk virtio_console'
# What tests may load; ext4 is built in.
modules='nbd loop brd null_blk dm-mod dm-flakey dm-delay dm-log-writes scsi_debug xfs btrfs overlay
	 virtiofs virtio_net'

need dpkg-deb dpkg
need depmod kmod
need busybox busybox-static
need lz4 lz4
need zstd zstd
need xz xz-utils
[ "$(dpkg --print-architecture)" = amd64 ] || lacks "an amd64 machine (the guest runs this machine's programs)"

# Which package, in which version. Without package lists (no network since the image was made) the
# newest cached kernel will do.
pkg=${NBDRS_GUEST_KERNEL:-}
case $pkg in
*.deb)
	[ -r "$pkg" ] || die "NBDRS_GUEST_KERNEL: cannot read $pkg"
	version=$(sha256sum <"$pkg" | cut -c1-16)
	;;
*)
	[ -n "$pkg" ] || pkg=$(apt-cache depends "$meta" 2>/dev/null |
		sed -n 's/^ *|\{0,1\}Depends: \(linux-image-[0-9].*-amd64\)$/\1/p' | head -n 1)
	version=
	[ -z "$pkg" ] || version=$(apt-cache show --no-all-versions "$pkg" 2>/dev/null |
		sed -n 's/^Version: //p' | head -n 1)
	;;
esac

recipe=$(cat "$0" "$here/initramfs.sh" "$(command -v busybox)" | sha256sum | cut -c1-16)
cache=$(cache_dir)
if [ -z "$version" ]; then
	entry=$(ls -dt "$cache"/kernel-*-"$recipe" 2>/dev/null | head -n 1)
	[ -n "$entry" ] || lacks "the package ${pkg:-$meta} (run: apt-get update)"
	echo "$entry"
	exit 0
fi
entry=$cache/kernel-$(basename "$pkg" .deb)-$(echo "$version" | tr -c 'A-Za-z0-9.\n' _)-$recipe
lock "$entry"
if [ -e "$entry/release" ]; then
	echo "$entry"
	exit 0
fi

work=$(mktemp -d "$cache/tmp.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

case $pkg in
*.deb)
	deb=$pkg
	;;
*)
	echo "guest: fetching $pkg $version" >&2
	(cd "$work" && apt-get -q download "$pkg" >fetch.log 2>&1) || {
		cat "$work/fetch.log" >&2
		lacks "the package $pkg (apt-get download failed)"
	}
	deb=$(echo "$work"/*.deb)
	;;
esac
dpkg-deb -x "$deb" "$work/x"
[ -d "$work/x/lib/modules" ] || mv "$work/x/usr/lib" "$work/x/lib"	# usr-merged packages (trixie)
release=$(ls "$work/x/lib/modules")
depmod -b "$work/x" "$release"

# --- the kernel ----------------------------------------------------------------------------------
# Offsets: Documentation/arch/x86/boot.rst. The payload starts after the setup sectors; its last four
# bytes are the unpacked size, which is not part of the stream.
u() {	# OFFSET BYTES -> number
	od -An -t "u$2" -j "$1" -N "$2" "$work/x/boot/vmlinuz-$release" | tr -d ' '
}
unpack_elf() {
	start=$((($(u 497 1) + 1) * 512 + $(u 584 4)))
	len=$(u 588 4)
	tail -c +$((start + 1)) "$work/x/boot/vmlinuz-$release" | head -c $((len - 4)) >"$work/payload" ||
		return 1
	case $(od -An -t x1 -N 4 "$work/payload" | tr -d ' ') in
	02214c18) tool='lz4 -dcq' ;;
	28b52ffd) tool='zstd -dcq' ;;
	fd377a58) tool='xz -dcq' ;;
	1f8b*) tool='gzip -dcq' ;;
	*) return 1 ;;
	esac
	$tool <"$work/payload" >"$work/out/vmlinux" 2>/dev/null || [ -s "$work/out/vmlinux" ] || return 1
	[ "$(od -An -t x1 -N 4 "$work/out/vmlinux" | tr -d ' ')" = 7f454c46 ]
}
mkdir "$work/out"
if ! unpack_elf; then
	echo "guest: cannot unpack the ELF file of $release, will boot the bzImage" >&2
	rm -f "$work/out/vmlinux"
	cp "$work/x/boot/vmlinuz-$release" "$work/out/vmlinuz"
fi

# --- modules -------------------------------------------------------------------------------------
show_depends() {	# MODULE... -> files, dependencies first; built-in modules give nothing
	for m; do
		modprobe -d "$work/x" -S "$release" --show-depends "$m" ||
			die "$release has no module $m"
	done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++'
}
tree=$work/out/lib/modules/$release
mkdir -p "$tree"
# shellcheck disable=SC2086 # lists of words
for f in $(show_depends $boot_modules $modules); do
	rel=${f#"$work/x/lib/modules/$release/"}
	mkdir -p "$tree/$(dirname "$rel")"
	cp "$f" "$tree/$rel"
done
cp "$work/x/lib/modules/$release"/modules.builtin* "$work/x/lib/modules/$release/modules.order" "$tree"
depmod -b "$work/out" "$release"

# --- initramfs -----------------------------------------------------------------------------------
mkdir -p "$work/i/bin" "$work/i/modules" "$work/i/dev" "$work/i/proc" "$work/i/sys" "$work/i/root"
cp "$(command -v busybox)" "$work/i/bin/busybox"
cp "$here/initramfs.sh" "$work/i/init"
chmod 755 "$work/i/init"
n=10
# shellcheck disable=SC2086
for f in $(show_depends $boot_modules); do
	case $f in
	*.ko) cp "$f" "$work/i/modules/$n-$(basename "$f")" ;;
	*.ko.xz) xz -dc "$f" >"$work/i/modules/$n-$(basename "$f" .xz)" ;;
	*.ko.zst) zstd -dcq "$f" >"$work/i/modules/$n-$(basename "$f" .zst)" ;;
	esac
	n=$((n + 1))
done
(cd "$work/i" && find . | busybox cpio -o -H newc 2>/dev/null) >"$work/out/initramfs"

echo "$release" >"$work/out/release"
mv -T "$work/out" "$entry"
echo "$entry"
