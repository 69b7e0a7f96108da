/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What one nbdrsd leaves to the next comes out as it went in, and nothing else comes out of anything else.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/handover.h"

#define HEAD "{\"format\":1,\"generation\":3,\"next_device\":7,"

static void fill(struct handover *h)
{
	struct handover_conn *c;
	struct handover_listener *l;
	struct handover_device *d;

	h->generation = 3;
	h->next_device = 7;
	for (int i = 0; i < 5; i++) {
		c = handover_add_conn(h);
		assert_non_null(c);
		assert_int_equal(c->fd, -1);
		c->fd = 10 + i;
		c->backend_id = strdup("nbdrs.my%20disk");
		c->size = i == 0 ? HANDOVER_NO_SIZE : (uint64_t)i << 40;
		c->stores = i & 1 ? strdup("file:/srv/my disk") : NULL;
		(void)snprintf(c->peer, sizeof(c->peer), "kernel:%d", i);
		c->is_structured = i & 1;
		c->has_meta = i == 1;
		c->is_kernel = i != 2;
		c->is_read_only = i == 3;
		c->left_len = (size_t)i * 1000;
		c->left = i ? malloc(c->left_len) : NULL;
		if (i)
			memset(c->left, 'a' + i, c->left_len);
	}
	c->has_refused = true;
	c->refused = (struct nbd_request){ 0xffff, 1, UINT64_MAX - 5, UINT64_MAX, UINT32_MAX };
	c->refused_error = 22;
	c->discard = UINT32_MAX;
	l = handover_add_listener(h);
	*l = (struct handover_listener){ .fd = 3, .is_unix = true, .path = strdup("/run/x \"y\""), .ino = UINT64_MAX };
	l = handover_add_listener(h);
	l->fd = 4;
	d = handover_add_device(h);
	*d = (struct handover_device){ .id = 6, .backend_id = strdup("nbdrs.d"), .connections = 4, .uid = UINT32_MAX };
	(void)snprintf(d->name, sizeof(d->name), "/dev/nbd0");
}

static void check_same(const struct handover *a, const struct handover *b)
{
	assert_int_equal(a->generation, b->generation);
	assert_int_equal(a->next_device, b->next_device);
	assert_int_equal(a->conns_n, b->conns_n);
	for (size_t i = 0; i < a->conns_n; i++) {
		const struct handover_conn *x = &a->conns[i], *y = &b->conns[i];

		assert_int_equal(x->fd, y->fd);
		assert_string_equal(x->backend_id, y->backend_id);
		assert_string_equal(x->peer, y->peer);
		assert_true(x->size == y->size && !x->stores == !y->stores);
		if (x->stores)
			assert_string_equal(x->stores, y->stores);
		assert_true(x->is_structured == y->is_structured && x->has_meta == y->has_meta);
		assert_true(x->is_kernel == y->is_kernel && x->is_read_only == y->is_read_only);
		assert_int_equal(x->left_len, y->left_len);
		assert_true(x->has_refused == y->has_refused);
		assert_memory_equal(&x->refused, &y->refused, sizeof(x->refused));
		assert_int_equal(x->refused_error, y->refused_error);
		assert_int_equal(x->discard, y->discard);
		if (y->left)
			assert_memory_equal(x->left, y->left, x->left_len);
	}
	assert_int_equal(a->listeners_n, b->listeners_n);
	for (size_t i = 0; i < a->listeners_n; i++) {
		const struct handover_listener *x = &a->listeners[i], *y = &b->listeners[i];

		assert_true(x->fd == y->fd && x->is_unix == y->is_unix && x->ino == y->ino && x->dev == y->dev);
		assert_true(!x->path == !y->path);
		if (x->path)
			assert_string_equal(x->path, y->path);
	}
	assert_int_equal(a->devices_n, b->devices_n);
	for (size_t i = 0; i < a->devices_n; i++) {
		const struct handover_device *x = &a->devices[i], *y = &b->devices[i];

		assert_true(x->id == y->id && x->connections == y->connections && x->uid == y->uid);
		assert_string_equal(x->name, y->name);
		assert_string_equal(x->backend_id, y->backend_id);
	}
}

static void test_round_trip(void **state)
{
	struct handover a = { 0 }, b = { 0 };
	struct err err = { "" };
	char *text;

	fill(&a);
	text = handover_encode(&a);
	assert_non_null(text);
	assert_int_equal(handover_decode(text, strlen(text), 10000, &b, &err), 0);
	check_same(&a, &b);
	handover_clear(&b);
	/* One byte more than there is room for. */
	assert_int_equal(handover_decode(text, strlen(text), 9999, &b, &err), -EPROTO);
	assert_int_equal(b.conns_n, 0);
	free(text);
	handover_clear(&a);
	/* Nothing at all is something, too. */
	a.generation = a.next_device = 1;
	text = handover_encode(&a);
	assert_int_equal(handover_decode(text, strlen(text), 0, &b, &err), 0);
	check_same(&a, &b);
	free(text);
}

static void test_file(void **state)
{
	struct handover a = { 0 }, b = { 0 };
	struct err err = { "" };
	int fd = memfd_create("t", MFD_CLOEXEC);
	off_t len;

	fill(&a);
	assert_int_equal(handover_save(&a, fd, &err), 0);
	assert_int_equal(handover_load(fd, &b, &err), 0);
	check_same(&a, &b);
	for (size_t i = 1; i < b.conns_n; i++)
		assert_non_null(b.conns[i].left);
	handover_clear(&b);
	/* Cut off anywhere it is refused, and nothing comes out. */
	len = lseek(fd, 0, SEEK_END);
	for (off_t cut = len - 1; cut >= 0; cut -= cut > 600 ? 97 : 1) {
		assert_int_equal(ftruncate(fd, cut), 0);
		err.msg[0] = '\0';
		assert_int_equal(handover_load(fd, &b, &err), -EPROTO);
		assert_true(*err.msg && b.conns_n == 0 && b.conns == NULL);
	}
	handover_clear(&a);
	(void)close(fd);
}

static void test_refused(void **state)
{
	static const struct {
		const char *text, *says;
	} bad[] = {
		{ "", "read" },
		{ "{", "read" },
		{ "[]", "read" },
		{ "{\"format\":2}", "format 2, this nbdrsd reads 1" },
		{ "{\"format\":1}", "lacks" },
		{ "{\"format\":1,\"generation\":0,\"next_device\":7}", "lacks" },
		{ "{\"format\":1,\"generation\":3,\"next_device\":0}", "lacks" },
		{ HEAD "\"conns\":[{}]}", "lacks" },
		{ HEAD "\"conns\":[{\"fd\":-1,\"left\":0,\"peer\":\"\",\"backend_id\":\"\"}]}", "lacks" },
		{ HEAD "\"conns\":[{\"fd\":1,\"left\":-1,\"peer\":\"\",\"backend_id\":\"\"}]}", "lacks" },
		{ HEAD "\"conns\":[{\"fd\":1,\"left\":101,\"peer\":\"\",\"backend_id\":\"\"}]}", "lacks" },
		{ HEAD "\"conns\":[{\"fd\":1,\"left\":60,\"peer\":\"\",\"backend_id\":\"\"},"
		       "{\"fd\":1,\"left\":60,\"peer\":\"\",\"backend_id\":\"\"}]}",
		  "lacks" },
		{ HEAD "\"conns\":[{\"fd\":1,\"left\":0,\"peer\":7,\"backend_id\":\"\"}]}", "lacks" },
		{ HEAD "\"conns\":[{\"fd\":1,\"left\":0,\"peer\":\"\"}]}", "lacks" },
		{ HEAD "\"conns\":[{\"fd\":1,\"left\":0,\"peer\":\"\",\"backend_id\":\"\",\"size\":-1}]}", "lacks" },
		{ HEAD "\"conns\":[{\"fd\":1,\"left\":0,\"peer\":\"\",\"backend_id\":\"\",\"stores\":1}]}", "lacks" },
		/* More to throw away than the request had. */
		{ HEAD "\"conns\":[{\"fd\":1,\"left\":0,\"peer\":\"\",\"backend_id\":\"\",\"refused\":{\"flags\":0,"
		       "\"type\":1,\"cookie\":0,\"off\":0,\"len\":5,\"error\":1,\"discard\":6}}]}",
		  "lacks" },
		{ HEAD "\"listeners\":[{\"fd\":1}]}", "lacks" },
		{ HEAD "\"devices\":[{\"id\":0}]}", "lacks" },
		{ HEAD "\"devices\":[1]}", "lacks" },
	};
	struct handover h = { 0 };

	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		struct err err = { "" };

		assert_int_equal(handover_decode(bad[i].text, strlen(bad[i].text), 100, &h, &err), -EPROTO);
		assert_non_null(strstr(err.msg, bad[i].says));
		assert_true(h.conns == NULL && h.listeners == NULL && h.devices == NULL);
	}
}

/* Sockets of the user's own may begin like those that systemd keeps for us. */
static void test_names(void **state)
{
	static const char *const kept[] = { "nbdrs-handover", "nbdrs-0", "nbdrs-4711" };
	static const char *const others[] = { "nbdrs-tls.socket", "nbdrs-", "nbdrs-1x", "nbdrs", "nbdrs-handover2",
					      "" };

	for (size_t i = 0; i < ARRAY_LEN(kept); i++)
		assert_true(handover_is_kept(kept[i]));
	for (size_t i = 0; i < ARRAY_LEN(others); i++)
		assert_false(handover_is_kept(others[i]));
}

/* What a newer one adds in the same format is no obstacle. */
static void test_unknown_members(void **state)
{
	static const char text[] =
		HEAD "\"new\":[1,2],\"conns\":[{\"fd\":5,\"left\":0,\"peer\":\"p\",\"backend_id\":\"b\",\"new\":{}}]}";
	struct handover h = { 0 };
	struct err err = { "" };

	assert_int_equal(handover_decode(text, sizeof(text) - 1, 0, &h, &err), 0);
	assert_int_equal(h.conns_n, 1);
	assert_int_equal(h.conns[0].fd, 5);
	handover_clear(&h);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_round_trip),
		cmocka_unit_test(test_file),
		cmocka_unit_test(test_refused),
		cmocka_unit_test(test_names),
		cmocka_unit_test(test_unknown_members),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
