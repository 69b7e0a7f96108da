#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# PID 1 of the systemd guest, for a moment: what `systemctl enable` and an administrator would have written, then
# systemd. Exports and files come with the archive (boots.py).
[[ $$ == 1 ]] || { echo "systemd-init.sh: not in the guest" >&2; exit 1; }
units=/etc/systemd/system
mkdir -p $units/multi-user.target.wants /data /part

# What has no business in a machine that lives for ten seconds.
for u in systemd-{sysusers,random-seed,update-utmp,update-utmp-runlevel,logind,user-sessions,timesyncd,networkd,resolved} \
	systemd-{hwdb-update,pstore,journal-flush,journal-catalog-update,update-done,binfmt,machine-id-commit,boot-update}; do
	ln -sf /dev/null $units/$u.service
done
for u in getty.target proc-sys-fs-binfmt_misc.automount {sys-kernel-{config,debug,tracing},dev-{hugepages,mqueue}}.mount \
	sys-fs-fuse-connections.mount modprobe@{configfs,dm_mod,drm,efi_pstore,fuse,loop}.service; do
	ln -sf /dev/null "$units/$u"
done
cat >$units/nbdrs-test.service <<'UNIT'
[Unit]
Description=The test
After=remote-fs.target nbdrs-autoattach.service
[Service]
ExecStart=/bin/bash /run/guest/main.sh
UNIT
# systemctl enable remote-fs.target (Debian does at installation) and nbdrs-autoattach
ln -s /usr/lib/systemd/system/remote-fs.target $units/multi-user.target.wants/
ln -s /usr/lib/systemd/system/nbdrs-autoattach.service $units/multi-user.target.wants/
ln -s $units/nbdrs-test.service $units/multi-user.target.wants/
exec /usr/lib/systemd/systemd --unit=multi-user.target --show-status=no --log-target=console --log-level=notice
