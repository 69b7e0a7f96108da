/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The nbd driver's generic-netlink interface: see nl.h. libnl's own translation of error numbers loses
 * some (EEXIST, EBUSY and others share names), so the kernel's are taken from the error message itself.
 */
#include "nl.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>

#include <netlink/genl/ctrl.h>
#include <netlink/genl/genl.h>
#include <netlink/netlink.h>

#include "nbdrs/cleanup.h"

struct nbdnl {
	struct nl_sock *sk;
	int family;
};

/* What a request waits for; `done` ends with the kernel's ACK or error. */
struct pending {
	int rc;
	bool is_done;
	int (*parse)(struct nlmsghdr *hdr, void *out);
	void *out;
};

/* libnl's numbers, where they come from the library and not from the kernel. */
static int from_libnl(int rc)
{
	switch (-rc) {
	case NLE_SUCCESS: return 0;
	case NLE_OBJ_NOTFOUND: return -ENOENT;
	case NLE_NOMEM: return -ENOMEM;
	case NLE_MSGSIZE: return -EMSGSIZE;
	case NLE_PERM: return -EPERM;
	case NLE_AGAIN: return -EAGAIN;
	case NLE_INTR: return -EINTR;
	case NLE_AF_NOSUPPORT:
	case NLE_PROTO_MISMATCH: return -EPROTONOSUPPORT;
	default: return -EIO;
	}
}

int nbdnl_open(struct nbdnl **out)
{
	struct nbdnl *nl = calloc(1, sizeof(*nl));
	int rc;

	if (!nl)
		return -ENOMEM;
	nl->sk = nl_socket_alloc();
	if (!nl->sk) {
		rc = -ENOMEM;
		goto fail;
	}
	rc = from_libnl(genl_connect(nl->sk));
	if (rc)
		goto fail;
	/* Reads the answer and its ACK, so none is left over to be taken for that of a CONNECT. */
	nl->family = genl_ctrl_resolve(nl->sk, NBD_NL_FAMILY);
	if (nl->family < 0) {
		rc = from_libnl(nl->family);
		goto fail;
	}
	*out = nl;
	return 0;
fail:
	nbdnl_close(nl);
	return rc;
}

void nbdnl_close(struct nbdnl *nl)
{
	if (!nl)
		return;
	nl_socket_free(nl->sk); /* takes NULL */
	free(nl);
}

static int on_valid(struct nl_msg *msg, void *arg)
{
	struct pending *p = arg;

	if (p->parse && !p->rc)
		p->rc = p->parse(nlmsg_hdr(msg), p->out);
	return NL_OK;
}

static int on_ack(struct nl_msg *msg, void *arg)
{
	struct pending *p = arg;

	p->is_done = true;
	return NL_STOP;
}

static int on_error(struct sockaddr_nl *from, struct nlmsgerr *e, void *arg)
{
	struct pending *p = arg;

	p->rc = e->error < 0 ? e->error : -EIO;
	p->is_done = true;
	return NL_STOP;
}

/* Sends `msg` (taken) and waits for the ACK, which the kernel sends after the reply. */
static int transact(struct nbdnl *nl, struct nl_msg *msg, struct pending *p)
{
	struct nl_cb *cb = nl_cb_alloc(NL_CB_DEFAULT);
	int rc;

	if (!cb) {
		nlmsg_free(msg);
		return -ENOMEM;
	}
	(void)nl_cb_set(cb, NL_CB_VALID, NL_CB_CUSTOM, on_valid, p);
	(void)nl_cb_set(cb, NL_CB_ACK, NL_CB_CUSTOM, on_ack, p);
	(void)nl_cb_err(cb, NL_CB_CUSTOM, on_error, p);
	rc = nl_send_auto(nl->sk, msg);
	nlmsg_free(msg);
	rc = rc < 0 ? from_libnl(rc) : 0;
	while (!rc && !p->is_done) {
		int got = nl_recvmsgs(nl->sk, cb);

		if (got < 0 && !p->is_done)
			rc = from_libnl(got);
	}
	nl_cb_put(cb);
	return rc ? rc : p->rc;
}

static struct nl_msg *request(struct nbdnl *nl, enum nbd_nl_cmd cmd)
{
	struct nl_msg *msg = nlmsg_alloc();

	if (!msg)
		return NULL;
	if (!genlmsg_put(msg, NL_AUTO_PORT, NL_AUTO_SEQ, nl->family, 0, NLM_F_REQUEST | NLM_F_ACK,
			 cmd, NBD_NL_VERSION)) {
		nlmsg_free(msg);
		return NULL;
	}
	return msg;
}

static int put_sockets(struct nl_msg *msg, const int *socks, unsigned socks_n)
{
	struct nlattr *list = nla_nest_start(msg, NBD_NL_A_SOCKETS);

	if (!list)
		return -EMSGSIZE;
	for (unsigned i = 0; i < socks_n; i++) {
		struct nlattr *item = nla_nest_start(msg, NBD_NL_SOCK_ITEM);

		if (!item || nla_put_u32(msg, NBD_NL_SOCK_FD, (uint32_t)socks[i]))
			return -EMSGSIZE;
		(void)nla_nest_end(msg, item); /* fails for empty ones only */
	}
	(void)nla_nest_end(msg, list);
	return 0;
}

int nbdnl_put_connect(struct nl_msg *msg, const struct nbdnl_connect *c)
{
	if (c->socks_n < 1 || c->socks_n > NL_SOCKS_MAX)
		return -EINVAL;
	if (c->index != NL_INDEX_ANY && nla_put_u32(msg, NBD_NL_A_INDEX, (uint32_t)c->index))
		return -EMSGSIZE;
	if (nla_put_u64(msg, NBD_NL_A_SIZE_BYTES, c->size) ||
	    nla_put_u64(msg, NBD_NL_A_BLOCK_SIZE_BYTES, c->block_size) ||
	    nla_put_u64(msg, NBD_NL_A_TIMEOUT, c->timeout_s) ||
	    nla_put_u64(msg, NBD_NL_A_SERVER_FLAGS, c->server_flags) ||
	    nla_put_u64(msg, NBD_NL_A_CLIENT_FLAGS, c->client_flags) ||
	    nla_put_u64(msg, NBD_NL_A_DEAD_CONN_TIMEOUT, c->dead_conn_timeout_s) ||
	    nla_put_string(msg, NBD_NL_A_BACKEND_ID, c->backend))
		return -EMSGSIZE;
	return put_sockets(msg, c->socks, c->socks_n);
}

static int parse_index(struct nlmsghdr *hdr, void *out)
{
	struct nlattr *tb[NBD_NL_A_MAX + 1];

	if (genlmsg_parse(hdr, 0, tb, NBD_NL_A_MAX, NULL) || !tb[NBD_NL_A_INDEX] ||
	    nla_len(tb[NBD_NL_A_INDEX]) < (int)sizeof(uint32_t))
		return -EBADMSG;
	*(int64_t *)out = nla_get_u32(tb[NBD_NL_A_INDEX]);
	return 0;
}

int nbdnl_connect(struct nbdnl *nl, const struct nbdnl_connect *c, uint32_t *index)
{
	int64_t got = -1;
	struct pending p = { .parse = parse_index, .out = &got };
	struct nl_msg *msg = request(nl, NBD_NL_CONNECT);
	int rc;

	if (!msg)
		return -ENOMEM;
	rc = nbdnl_put_connect(msg, c);
	if (rc) {
		nlmsg_free(msg);
		return rc;
	}
	rc = transact(nl, msg, &p);
	if (rc)
		return rc;
	/* An ACK without the reply: were it possible, the device would still be the one asked for. */
	if (got < 0)
		got = c->index;
	if (got < 0)
		return -EBADMSG;
	*index = (uint32_t)got;
	return 0;
}

int nbdnl_disconnect(struct nbdnl *nl, uint32_t index)
{
	struct pending p = { 0 };
	struct nl_msg *msg = request(nl, NBD_NL_DISCONNECT);

	if (!msg)
		return -ENOMEM;
	if (nla_put_u32(msg, NBD_NL_A_INDEX, index)) {
		nlmsg_free(msg);
		return -EMSGSIZE;
	}
	return transact(nl, msg, &p);
}

int nbdnl_reconfigure(struct nbdnl *nl, uint32_t index, const char *backend, const int *socks,
		      unsigned socks_n)
{
	struct pending p = { 0 };
	struct nl_msg *msg;
	int rc;

	if (socks_n < 1 || socks_n > NL_SOCKS_MAX)
		return -EINVAL;
	msg = request(nl, NBD_NL_RECONFIGURE);
	if (!msg)
		return -ENOMEM;
	rc = nla_put_u32(msg, NBD_NL_A_INDEX, index) ||
			     nla_put_string(msg, NBD_NL_A_BACKEND_ID, backend)
		     ? -EMSGSIZE
		     : put_sockets(msg, socks, socks_n);
	if (rc) {
		nlmsg_free(msg);
		return rc;
	}
	return transact(nl, msg, &p);
}

int nbdnl_resize(struct nbdnl *nl, uint32_t index, const char *backend, uint64_t size)
{
	struct pending p = { 0 };
	struct nl_msg *msg = request(nl, NBD_NL_RECONFIGURE);

	if (!msg)
		return -ENOMEM;
	/* Nothing else: a time-out would set the request timer anew, and another block size is never right. */
	if (nla_put_u32(msg, NBD_NL_A_INDEX, index) || nla_put_string(msg, NBD_NL_A_BACKEND_ID, backend) ||
	    nla_put_u64(msg, NBD_NL_A_SIZE_BYTES, size)) {
		nlmsg_free(msg);
		return -EMSGSIZE;
	}
	return transact(nl, msg, &p);
}

int nbdnl_listen(struct nbdnl *nl)
{
	int group = genl_ctrl_resolve_grp(nl->sk, NBD_NL_FAMILY, NBD_NL_GROUP);

	if (group < 0)
		return from_libnl(group);
	nl_socket_disable_seq_check(nl->sk); /* what comes unasked has no number */
	group = nl_socket_add_membership(nl->sk, group);
	return from_libnl(group);
}

int nbdnl_fd(const struct nbdnl *nl)
{
	return nl_socket_get_fd(nl->sk);
}

void nbdnl_drain(struct nbdnl *nl)
{
	char buf[4096];

	/* Beyond its buffer the kernel drops messages and says ENOBUFS once: something was heard all the same. */
	while (recv(nl_socket_get_fd(nl->sk), buf, sizeof(buf), MSG_DONTWAIT) > 0 || errno == ENOBUFS)
		;
}

struct status_out {
	struct nbdnl_device *devices;
	unsigned max, *n;
};

int nbdnl_parse_status(const void *attrs, size_t len, struct nbdnl_device *devices,
		       unsigned devices_max, unsigned *devices_n)
{
	struct nlattr *tb[NBD_NL_A_MAX + 1];
	struct nlattr *item;
	unsigned n = 0;
	int rest;

	if (len > INT32_MAX ||
	    nla_parse(tb, NBD_NL_A_MAX, (struct nlattr *)(uintptr_t)attrs, (int)len, NULL))
		return -EBADMSG;
	if (tb[NBD_NL_A_DEVICE_LIST]) {
		nla_for_each_nested(item, tb[NBD_NL_A_DEVICE_LIST], rest)
		{
			struct nlattr *d[NBD_NL_DEVICE_MAX + 1];

			if (n == devices_max)
				break;
			if (nla_type(item) != NBD_NL_DEVICE_ITEM)
				continue;
			if (nla_parse_nested(d, NBD_NL_DEVICE_MAX, item, NULL) ||
			    !d[NBD_NL_DEVICE_INDEX] || !d[NBD_NL_DEVICE_CONNECTED] ||
			    nla_len(d[NBD_NL_DEVICE_INDEX]) < (int)sizeof(uint32_t) ||
			    nla_len(d[NBD_NL_DEVICE_CONNECTED]) < 1)
				return -EBADMSG;
			devices[n].index = nla_get_u32(d[NBD_NL_DEVICE_INDEX]);
			devices[n].is_in_use = nla_get_u8(d[NBD_NL_DEVICE_CONNECTED]) != 0;
			n++;
		}
	}
	*devices_n = n;
	return 0;
}

static int parse_status(struct nlmsghdr *hdr, void *out)
{
	struct status_out *o = out;
	struct genlmsghdr *g = genlmsg_hdr(hdr);

	return nbdnl_parse_status(genlmsg_attrdata(g, 0), (size_t)genlmsg_attrlen(g, 0), o->devices,
				  o->max, o->n);
}

int nbdnl_status(struct nbdnl *nl, int64_t index, struct nbdnl_device *devices,
		 unsigned devices_max, unsigned *devices_n)
{
	unsigned n = 0;
	struct status_out o = { .devices = devices, .max = devices_max, .n = &n };
	struct pending p = { .parse = parse_status, .out = &o };
	struct nl_msg *msg = request(nl, NBD_NL_STATUS);
	int rc;

	if (!msg)
		return -ENOMEM;
	if (index != NL_INDEX_ANY && nla_put_u32(msg, NBD_NL_A_INDEX, (uint32_t)index)) {
		nlmsg_free(msg);
		return -EMSGSIZE;
	}
	rc = transact(nl, msg, &p);
	if (rc)
		return rc;
	*devices_n = n;
	return 0;
}
