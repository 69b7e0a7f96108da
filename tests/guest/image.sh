#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
#
# image.sh KERNEL_DIR [systemd] - build the guest's root disk from programs of this machine.
#
# Prints one line: an ext4 image (sparse, 3 GiB) with the programs below, their shared libraries, udev
# with its rules, and KERNEL_DIR's modules; with the word systemd, also that package. No package is fetched. What changes from run to run -
# nbdrs itself and the tests - is not in it: guest.py hands that over as a second disk.
#
# The image is a cache entry named by a hash of this script, of the kernel entry and of path, size and
# time of every file that goes in, so an upgraded package makes a new one.
#
# Exit: 0; 77 a program is missing, with the command that installs it on stderr; 1 anything else.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/guest/cache.sh
. "$here/cache.sh"

[ -d "${1:-}/lib/modules" ] && [ "${2:-systemd}" = systemd ] || die "usage: image.sh KERNEL_DIR [systemd]"
kernel=$1
flavour=${2:-plain}

# package: programs. Everything is required: a test that finds its tool gone would be a silent skip.
programs='
bash: bash
dash: sh
coreutils: cat chmod chown cp cut date dd df du env expr false head id ln ls md5sum mkdir mkfifo mknod
	mktemp mv nproc od paste printf readlink realpath rm rmdir seq sha256sum sleep sort split stat sync tac
	tail tee test timeout touch tr true truncate uname uniq wc
diffutils: cmp diff
findutils: find xargs
grep: grep
mawk: awk
sed: sed
tar: tar
procps: pgrep pkill ps sysctl
util-linux: blkdiscard blkid blockdev dmesg fallocate findmnt flock fsck fstrim losetup lsblk mkswap mountpoint
	partx setpriv setsid swapoff swapon taskset wipefs
mount: mount umount
fdisk: sfdisk
e2fsprogs: debugfs dumpe2fs e2fsck fsck.ext4 mke2fs mkfs.ext4 resize2fs tune2fs
kmod: kmod modprobe rmmod lsmod
udev: udevadm
dmsetup: dmsetup
iproute2: ip ss
jq: jq
fio: fio
strace: strace
busybox-static: busybox
qemu-utils: qemu-nbd qemu-img qemu-io
nbdkit: nbdkit
nbd-client: nbd-client
nbd-server: nbd-server
'
# Other files; a folder stands for what is in it.
extras='/usr/lib/udev/rules.d /usr/lib/udev/ata_id /usr/lib/udev/scsi_id /usr/lib/systemd/systemd-udevd
/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-file-plugin.so
/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-memory-plugin.so
/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-null-plugin.so'

need mke2fs e2fsprogs
need ldd libc-bin

# in_path PROGRAM: its file, which `command -v` does not give for what the shell has built in.
in_path() (
	IFS=:
	for d in $PATH; do
		if [ -f "$d/$1" ] && [ -x "$d/$1" ]; then
			echo "$d/$1"
			exit 0
		fi
	done
	exit 1
)

# --- what goes in --------------------------------------------------------------------------------
paths=
missing=
pkg=
for word in $programs; do
	case $word in
	*:) pkg=${word%:} ;;
	*)
		if p=$(in_path "$word"); then
			paths="$paths $p"
		else
			case " $missing " in *" $pkg "*) ;; *) missing="$missing $pkg" ;; esac
		fi
		;;
	esac
done
[ -z "$missing" ] || lacks "programs to put into the guest (run: apt-get install$missing)"
for p in $extras; do
	[ -e "$p" ] || lacks "$p (run: apt-get install udev nbdkit)"
	paths="$paths $(find "$p" -type f -o -type l | tr '\n' ' ')"
done
# The packages as they are, links included: they are what enables units.
package=
if [ "$flavour" = systemd ]; then
	[ -x /usr/bin/systemctl ] || lacks "systemd (run: apt-get install systemd)"
	for p in $(dpkg -L systemd udev | grep -Ev '^/usr/share/(doc|man|locale|lintian|zsh|bash-completion)/'); do
		if [ -L "$p" ] || [ -f "$p" ]; then
			package="$package $p"
		fi
	done
fi
# Libraries as the loader finds them: "name => path (address)", and the loader's own path. Scripts
# and static programs give an error that means nothing here.
linked=
for p in $paths $package; do
	case $p in
	*.so | *.so.*) linked="$linked $p" ;;
	*) [ ! -x "$p" ] || linked="$linked $p" ;;
	esac
done
# shellcheck disable=SC2086
libs=$(ldd $linked 2>/dev/null | sed -n 's/^\t\(.* => \)\{0,1\}\(\/[^ ]*\) (0x.*/\2/p' | sort -u)

cache=$(cache_dir)
# shellcheck disable=SC2086
hash=$({
	basename "$kernel"
	cat "$0" "$here/guest-init.sh"
	stat -L -c '%n %s %Y' $paths $libs
	[ -z "$package" ] || stat -c '%n %s %Y' $package
} | sha256sum | cut -c1-24)
image=$cache/root-$flavour-$hash.ext4
lock "$image"
if [ -e "$image" ]; then
	touch -a "$image"	# its mtime is its ETag, where a web server gives it
	echo "$image"
	exit 0
fi

# --- the tree ------------------------------------------------------------------------------------
work=$(mktemp -d "$cache/tmp.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
t=$work/tree
mkdir -p "$t/usr/bin" "$t/usr/sbin" "$t/usr/lib64" "$t/usr/lib/modules" "$t/etc/udev/rules.d" \
	"$t/proc" "$t/sys" "$t/dev" "$t/run" "$t/tmp" "$t/mnt" "$t/srv" "$t/root" "$t/var/tmp"
for d in bin sbin lib lib64; do
	ln -s "usr/$d" "$t/$d"
done
ln -s /run "$t/var/run"
ln -s /run/lock "$t/var/lock"
for p in $paths $libs; do
	d=$t$(readlink -f "$(dirname "$p")")
	mkdir -p "$d"
	cp -Lp "$p" "$d/"
done
if [ -n "$package" ]; then
	mkdir -p "$t/etc/systemd/system" "$t/var/lib/systemd" "$t/var/log"
	# shellcheck disable=SC2046,SC2086 # a list of paths without blanks
	tar -C / -cf - $(printf '.%s ' $package) | tar -C "$t" -xf -
fi
cp -a "$kernel/lib/modules/." "$t/usr/lib/modules/"
cp "$here/guest-init.sh" "$t/usr/sbin/guest-init"
chmod 755 "$t/usr/sbin/guest-init"
# udev needs these names, and the tests nothing more.
cat >"$t/etc/passwd" <<'EOF'
root:x:0:0:root:/root:/bin/bash
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
EOF
getent group | awk -F: '$3 < 1000 { print $1 ":x:" $3 ":" }' >"$t/etc/group"
echo 'passwd: files
group: files
hosts: files' >"$t/etc/nsswitch.conf"
echo '127.0.0.1 localhost' >"$t/etc/hosts"
echo 0123456789abcdef0123456789abcdef >"$t/etc/machine-id"
echo 'event_timeout=30' >"$t/etc/udev/udev.conf"
: >"$t/etc/fstab"

truncate -s 3G "$work/root.ext4"
mke2fs -q -t ext4 -b 4096 -O ^has_journal -E root_owner=0:0,lazy_itable_init=1,nodiscard \
	-L nbdrs-guest -d "$t" "$work/root.ext4"
mv "$work/root.ext4" "$image"
# Entries that nobody has used for two weeks.
find "$cache" -maxdepth 1 \( -name 'root-*.ext4' -atime +14 -o -name 'root-*.lock' -mtime +14 \) \
	-delete 2>/dev/null || :
echo "$image"
