/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * `file` as an object store, killed while it puts: every object is whole afterwards, and none is older than what was
 * answered.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "conform_store.h"
#include "conformance.h"
#include "kill_child.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"
#include "temp.h"

enum { ROUNDS = 50, OBJECTS = 8, SIZE_MAX_KILLED = 200000 };

struct header {
	uint64_t magic, generation, size;
};

#define MAGIC UINT64_C(0x6e62647273746f72)

/* One line of the pipe: this generation of this object was answered. */
struct answered {
	uint32_t object, generation;
};

/* Whole objects, and parts of others, until somebody kills us. */
static CO_FN void put_for_ever(void *arg)
{
	struct kill_writer w = *(struct kill_writer *)arg;
	_cleanup_free_ uint8_t *data = malloc(SIZE_MAX_KILLED);
	struct obj obj;
	char name[16];
	int rc = 0;
	struct chan *c = chain_chan(w.chain, &rc);

	(void)snprintf(name, sizeof(name), "k-%u", w.number);
	if (!c || !data || obj_set(&obj, name))
		return;
	for (uint64_t generation = w.first;; generation++) {
		uint64_t state = generation * 31 + w.number;
		struct header h = { MAGIC, generation,
				    sizeof(h) + random_below(&state, SIZE_MAX_KILLED - sizeof(h)) };
		struct answered a = { w.number, (uint32_t)generation };
		struct iovec v;
		struct iov iov = iov_one(&v, data, h.size);
		struct put put = { .obj = &obj, .iov = &iov };

		store_fill(data, h.size, generation);
		memcpy(data, &h, sizeof(h));
		if (ch_put(c, &put, NULL) != 0 || write(w.pipe, &a, sizeof(a)) != sizeof(a))
			return;
	}
}

struct kill_state {
	char text[300];
	uint32_t generations[OBJECTS]; /* the last that was answered */
	struct err err;
	char failure[300];
};

/* One object: whole, and not older than what was answered. */
static CO_FN int check_killed(struct kill_state *k, struct chan *c, unsigned object, uint8_t *data,
			      uint8_t *want)
{
	struct obj_stat st;
	struct header h;
	struct iovec v;
	struct iov iov;
	struct obj obj;
	char name[16];
	int rc;

	(void)snprintf(name, sizeof(name), "k-%u", object);
	(void)obj_set(&obj, name);
	rc = ch_stat(c, &obj, &st);
	if (rc == -ENOENT && k->generations[object] == 0)
		return 0;
	if (rc == 0 && (st.size > SIZE_MAX_KILLED || st.size < sizeof(h)))
		rc = -EFBIG;
	if (rc == 0) {
		iov = iov_one(&v, data, st.size);
		rc = ch_read(c, (struct ext){ &obj, 0, st.size }, &iov, 0);
	}
	if (rc) {
		(void)snprintf(k->failure, sizeof(k->failure), "%s: %s", name, err_name(rc));
		return -1;
	}
	memcpy(&h, data, sizeof(h));
	store_fill(want, st.size, h.generation);
	memcpy(want, &h, sizeof(h));
	if (h.magic == MAGIC && h.size == st.size && memcmp(data, want, st.size) == 0 &&
	    h.generation >= k->generations[object])
		return 0;
	(void)snprintf(k->failure, sizeof(k->failure),
		       "%s: torn or old: generation %ju of %ju bytes, in %ju; %u was answered",
		       name, (uintmax_t)h.generation, (uintmax_t)h.size, (uintmax_t)st.size,
		       k->generations[object]);
	return -1;
}

static int no_temps(void *arg, const char *name, uint64_t size)
{
	unsigned *n = arg;

	(*n)++;
	return strncmp(name, "k-", 2) == 0 ? 0 : -EINVAL;
}

static CO_FN int look_at_killed(void *arg)
{
	struct kill_state *k = arg;
	_cleanup_free_ uint8_t *data = malloc(SIZE_MAX_KILLED), *want = malloc(SIZE_MAX_KILLED);
	struct spec *spec = NULL;
	struct chain *chain = NULL;
	struct chan *c = NULL;
	unsigned n = 0;
	int rc = spec_parse(k->text, &spec, &k->err);

	if (rc == 0)
		rc = chain_build_keyed(spec, false, &chain, &k->err);
	if (rc == 0)
		rc = chain_open(chain, &k->err);
	if (rc)
		(void)snprintf(k->failure, sizeof(k->failure), "%.250s", k->err.msg);
	else
		c = chain_chan(chain, &rc);
	for (unsigned i = 0; c && i < OBJECTS && !k->failure[0]; i++)
		(void)check_killed(k, c, i, data, want);
	if (c && ch_list(c, "", no_temps, &n) != 0)
		(void)snprintf(k->failure, sizeof(k->failure), "list");
	if (c)
		(void)chain_close(chain);
	chain_free(chain);
	spec_free(spec);
	return 0;
}

/* Lets the child answer so many puts, kills it, takes in what it had answered by then. */
static void kill_after(struct kill_state *k, pid_t pid, int fd, unsigned answers)
{
	struct answered a;

	for (unsigned n = 0; read(fd, &a, sizeof(a)) == sizeof(a); n++) {
		assert_true(a.object < OBJECTS);
		k->generations[a.object] = a.generation;
		if (n == answers)
			kill_child_kill(pid);
	}
	kill_child_wait(pid);
}

static void test_killed(void **state)
{
	struct kill_state k = { .failure = "" };
	char *folder = temp_folder();
	uint64_t seed = 99;

	(void)snprintf(k.text, sizeof(k.text), "file:%s/", folder);
	for (unsigned round = 0; round < ROUNDS && !k.failure[0]; round++) {
		uint64_t first = 1;
		int from = -1;
		pid_t pid;

		for (unsigned i = 0; i < OBJECTS; i++)
			first = MAX(
				first,
				k.generations[i] +
					UINT64_C(
						100)); /* a put that was not answered may be there */
		pid = kill_child_start(k.text, first, &from);
		kill_after(&k, pid, from, (unsigned)random_below(&seed, 40));
		close(from);
		assert_int_equal(reactor_call_blocking(reactor_get(0), look_at_killed, &k), 0);
		if (k.failure[0])
			fail_msg("round %u: %s", round, k.failure);
	}
	temp_remove_free(folder);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_killed),
	};
	int failed;

	if (kill_child_is(argc, argv))
		return kill_child_main(argv, put_for_ever, OBJECTS);
	conform_start();
	failed = cmocka_run_group_tests_name("file store killed", tests, NULL, NULL);
	conform_stop();
	return failed;
}
