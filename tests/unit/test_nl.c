/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Netlink messages to the nbd driver (tool/nl.c): what is built is read back with the attribute numbers
 * and types of the kernel's own header.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <string.h>

#include <linux/nbd-netlink.h>
#include <netlink/attr.h>
#include <netlink/msg.h>

#include "nbdrs/cleanup.h"
#include "nl.h"

/* Ours are written down because older headers lack some; where both are there they agree. */
static void test_constants(void **state)
{
	assert_string_equal(NBD_NL_FAMILY, NBD_GENL_FAMILY_NAME);
	assert_int_equal(NBD_NL_VERSION, NBD_GENL_VERSION);
	assert_int_equal(NBD_NL_CONNECT, NBD_CMD_CONNECT);
	assert_int_equal(NBD_NL_DISCONNECT, NBD_CMD_DISCONNECT);
	assert_int_equal(NBD_NL_RECONFIGURE, NBD_CMD_RECONFIGURE);
	assert_int_equal(NBD_NL_STATUS, NBD_CMD_STATUS);
	assert_int_equal(NBD_NL_LINK_DEAD, NBD_CMD_LINK_DEAD);
}

static const int fds[] = { 5, 9, 70000 };

static const struct nbdnl_connect full = {
	.index = 0, /* 0 must not be taken for "none" */
	.size = (UINT64_C(1) << 40) + 512,
	.block_size = 4096,
	.server_flags = 0x10d,
	.client_flags = 0,
	.timeout_s = 0,
	.dead_conn_timeout_s = 300,
	.backend = "nbdrs.disk0",
	.socks = fds,
	.socks_n = 3,
};

static void read_back(struct nl_msg *msg, struct nlattr **tb)
{
	struct nlmsghdr *hdr = nlmsg_hdr(msg);

	assert_int_equal(nlmsg_parse(hdr, 0, tb, NBD_NL_A_MAX, NULL), 0);
}

static uint64_t u64(struct nlattr **tb, int type)
{
	assert_non_null(tb[type]);
	assert_int_equal(nla_len(tb[type]), sizeof(uint64_t));
	return nla_get_u64(tb[type]);
}

static void test_connect(void **state)
{
	struct nlattr *tb[NBD_NL_A_MAX + 1], *item;
	struct nl_msg *msg = nlmsg_alloc();
	unsigned n = 0;
	int rest;

	assert_int_equal(nbdnl_put_connect(msg, &full), 0);
	read_back(msg, tb);
	assert_non_null(tb[NBD_ATTR_INDEX]);
	assert_int_equal(nla_len(tb[NBD_ATTR_INDEX]), sizeof(uint32_t));
	assert_int_equal(nla_get_u32(tb[NBD_ATTR_INDEX]), 0);
	assert_true(u64(tb, NBD_ATTR_SIZE_BYTES) == full.size);
	assert_true(u64(tb, NBD_ATTR_BLOCK_SIZE_BYTES) == 4096);
	assert_true(u64(tb, NBD_ATTR_TIMEOUT) == 0);
	assert_true(u64(tb, NBD_ATTR_SERVER_FLAGS) == 0x10d);
	assert_true(u64(tb, NBD_ATTR_CLIENT_FLAGS) == 0);
	assert_true(u64(tb, NBD_ATTR_DEAD_CONN_TIMEOUT) == 300);
	assert_non_null(tb[NBD_NL_A_BACKEND_ID]);
	assert_string_equal(nla_get_string(tb[NBD_NL_A_BACKEND_ID]), "nbdrs.disk0");
	/* The kernel wants it with its NUL. */
	assert_int_equal(nla_len(tb[NBD_NL_A_BACKEND_ID]), strlen("nbdrs.disk0") + 1);

	assert_non_null(tb[NBD_ATTR_SOCKETS]);
	nla_for_each_nested(item, tb[NBD_ATTR_SOCKETS], rest)
	{
		struct nlattr *s[NBD_SOCK_MAX + 1];

		assert_int_equal(nla_type(item), NBD_SOCK_ITEM);
		assert_int_equal(nla_parse_nested(s, NBD_SOCK_MAX, item, NULL), 0);
		assert_non_null(s[NBD_SOCK_FD]);
		assert_int_equal(nla_len(s[NBD_SOCK_FD]), sizeof(uint32_t));
		assert_int_equal(nla_get_u32(s[NBD_SOCK_FD]), n < ARRAY_LEN(fds) ? fds[n] : -1);
		n++;
	}
	assert_int_equal(n, 3);
	nlmsg_free(msg);
}

static void test_connect_any(void **state)
{
	struct nbdnl_connect c = full;
	struct nlattr *tb[NBD_NL_A_MAX + 1];
	struct nl_msg *msg = nlmsg_alloc();

	c.index = NL_INDEX_ANY;
	assert_int_equal(nbdnl_put_connect(msg, &c), 0);
	read_back(msg, tb);
	assert_null(tb[NBD_ATTR_INDEX]);
	assert_non_null(tb[NBD_ATTR_SIZE_BYTES]);
	nlmsg_free(msg);
}

static void test_connect_limits(void **state)
{
	struct nbdnl_connect c = full;
	struct nl_msg *msg = nlmsg_alloc();
	static int many[NL_SOCKS_MAX + 1];
	static char name[8192];

	c.socks = many;
	c.socks_n = 0;
	assert_int_equal(nbdnl_put_connect(msg, &c), -EINVAL);
	c.socks_n = NL_SOCKS_MAX + 1;
	assert_int_equal(nbdnl_put_connect(msg, &c), -EINVAL);
	c.socks_n = NL_SOCKS_MAX;
	assert_int_equal(nbdnl_put_connect(msg, &c), 0);
	nlmsg_free(msg);

	msg = nlmsg_alloc();
	memset(name, 'n', sizeof(name) - 1);
	c.backend = name;
	assert_int_equal(nbdnl_put_connect(msg, &c), -EMSGSIZE);
	nlmsg_free(msg);
}

static void put_device(struct nl_msg *msg, uint32_t index, uint8_t connected)
{
	struct nlattr *item = nla_nest_start(msg, NBD_DEVICE_ITEM);

	assert_int_equal(nla_put_u32(msg, NBD_DEVICE_INDEX, index), 0);
	assert_int_equal(nla_put_u8(msg, NBD_DEVICE_CONNECTED, connected), 0);
	nla_nest_end(msg, item);
}

static int parse(struct nl_msg *msg, struct nbdnl_device *d, unsigned max, unsigned *n)
{
	struct nlmsghdr *hdr = nlmsg_hdr(msg);

	return nbdnl_parse_status(nlmsg_data(hdr), (size_t)nlmsg_datalen(hdr), d, max, n);
}

static void test_status(void **state)
{
	struct nl_msg *msg = nlmsg_alloc();
	struct nlattr *list = nla_nest_start(msg, NBD_ATTR_DEVICE_LIST);
	struct nbdnl_device d[3];
	unsigned n = 77;

	put_device(msg, 0, 1);
	put_device(msg, 1, 0);
	put_device(msg, 32767, 2); /* any value but 0 is a yes */
	nla_nest_end(msg, list);
	assert_int_equal(parse(msg, d, 3, &n), 0);
	assert_int_equal(n, 3);
	assert_true(d[0].index == 0 && d[0].is_in_use);
	assert_true(d[1].index == 1 && !d[1].is_in_use);
	assert_true(d[2].index == 32767 && d[2].is_in_use);
	/* No more than there is room for. */
	assert_int_equal(parse(msg, d, 2, &n), 0);
	assert_int_equal(n, 2);
	nlmsg_free(msg);
}

static void test_status_odd(void **state)
{
	struct nl_msg *msg = nlmsg_alloc();
	struct nlattr *list, *item;
	struct nbdnl_device d[3];
	unsigned n = 77;

	/* No list: no devices. */
	assert_int_equal(parse(msg, d, 3, &n), 0);
	assert_int_equal(n, 0);
	nlmsg_free(msg);

	/* An item without its index. */
	msg = nlmsg_alloc();
	n = 77;
	list = nla_nest_start(msg, NBD_ATTR_DEVICE_LIST);
	item = nla_nest_start(msg, NBD_DEVICE_ITEM);
	assert_int_equal(nla_put_u8(msg, NBD_DEVICE_CONNECTED, 1), 0);
	nla_nest_end(msg, item);
	nla_nest_end(msg, list);
	assert_int_equal(parse(msg, d, 3, &n), -EBADMSG);
	assert_int_equal(n, 77);
	nlmsg_free(msg);

	/* An index that is too short. */
	msg = nlmsg_alloc();
	list = nla_nest_start(msg, NBD_ATTR_DEVICE_LIST);
	item = nla_nest_start(msg, NBD_DEVICE_ITEM);
	assert_int_equal(nla_put_u8(msg, NBD_DEVICE_INDEX, 1), 0);
	assert_int_equal(nla_put_u8(msg, NBD_DEVICE_CONNECTED, 1), 0);
	nla_nest_end(msg, item);
	nla_nest_end(msg, list);
	assert_int_equal(parse(msg, d, 3, &n), -EBADMSG);
	nlmsg_free(msg);
}

/* On a machine without the driver that is what we are told; with it, STATUS works for anybody. */
static void test_open(void **state)
{
	struct nbdnl_device d[16];
	struct nbdnl *nl = NULL;
	unsigned n = 77;
	int rc = nbdnl_open(&nl);

	if (rc) {
		assert_int_equal(rc, -ENOENT);
		assert_null(nl);
		return;
	}
	assert_int_equal(nbdnl_status(nl, 0, d, ARRAY_LEN(d), &n), 0);
	assert_true(n <= 1);
	nbdnl_close(nl);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_constants),   cmocka_unit_test(test_connect),
		cmocka_unit_test(test_connect_any), cmocka_unit_test(test_connect_limits),
		cmocka_unit_test(test_status),      cmocka_unit_test(test_status_odd),
		cmocka_unit_test(test_open),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
