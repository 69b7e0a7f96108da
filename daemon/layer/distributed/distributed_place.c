/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Where the objects of a distributed volume lie, and what they are called there. Pure: numbers and names.
 *
 * Format (nbd-rs): of the C = choose(nodes, replicas) ways to pick `replicas` nodes, in lexicographic order, shard N
 * takes number N mod C; replica R is the object block-N-R on the R-th node of that combination.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "layer/distributed/distributed.h"

void placing_init(struct placing *p, unsigned nodes, unsigned replicas)
{
	memset(p, 0, sizeof(*p));
	p->nodes = nodes;
	p->replicas = replicas;
	/* Pascal's triangle; the largest, choose(64, 32), is below 2^61. */
	for (unsigned n = 0; n <= NODES_MAX; n++) {
		p->choose[n][0] = 1;
		for (unsigned k = 1; k <= n; k++)
			p->choose[n][k] =
				p->choose[n - 1][k - 1] + (k < n ? p->choose[n - 1][k] : 0);
	}
}

void place_shard(const struct placing *p, uint64_t shard, uint8_t *node)
{
	uint64_t rank = shard % p->choose[p->nodes][p->replicas];
	unsigned r = 0;

	for (unsigned i = 0; r < p->replicas; i++) {
		/* How many combinations have node i at position r: those of the rest behind it. */
		uint64_t with = p->choose[p->nodes - i - 1][p->replicas - r - 1];

		if (rank < with)
			node[r++] = (uint8_t)i;
		else
			rank -= with;
	}
}

/* A number as we write it: digits, no zero in front. Returns the end of it; NULL when there is none. */
static const char *take_number(const char *text, uint64_t *value)
{
	uint64_t v = 0;
	const char *at = text;

	for (; *at >= '0' && *at <= '9'; at++)
		if (__builtin_mul_overflow(v, 10, &v) ||
		    __builtin_add_overflow(v, (uint64_t)(*at - '0'), &v))
			return NULL;
	if (at == text || (*text == '0' && at - text > 1))
		return NULL;
	*value = v;
	return at;
}

/* "block-N" and, where `r` is given, "-R". */
static bool parse_block(const char *name, uint64_t *shard, uint64_t *r)
{
	const char *end;

	if (strncmp(name, "block-", 6) != 0)
		return false;
	end = take_number(name + 6, shard);
	if (end != NULL && r != NULL)
		end = *end == '-' ? take_number(end + 1, r) : NULL;
	return end != NULL && *end == '\0';
}

bool place_is_shard(const char *name)
{
	uint64_t shard;

	return parse_block(name, &shard, NULL);
}

void place_shard_name(uint64_t shard, char name[32])
{
	(void)snprintf(name, 32, "block-%" PRIu64, shard);
}

int place_name(const struct placing *p, const char *name, struct place *out)
{
	uint64_t shard, r;

	out->is_shard = parse_block(name, &shard, NULL);
	if (out->is_shard) {
		out->shard = shard;
		out->n = p->replicas;
		place_shard(p, shard, out->node);
		return 0;
	}
	if (strncmp(name, RECORD_PREFIX, strlen(RECORD_PREFIX)) == 0 ||
	    strcmp(name, DOUBT_NAME) == 0 || parse_block(name, &shard, &r))
		return -EINVAL;
	out->shard = 0;
	out->n = p->nodes;
	for (unsigned i = 0; i < p->nodes; i++)
		out->node[i] = (uint8_t)i;
	return 0;
}

int place_holder(const struct place *at, unsigned node)
{
	for (unsigned r = 0; r < at->n; r++)
		if (at->node[r] == node)
			return (int)r;
	return -1;
}

void place_stored(const struct place *at, const char *name, unsigned r, struct obj *out)
{
	char stored[OBJ_NAME_MAX + 1];

	if (at->is_shard)
		(void)snprintf(stored, sizeof(stored), "block-%" PRIu64 "-%u", at->shard, r);
	else
		(void)snprintf(stored, sizeof(stored), "%s", name);
	(void)obj_set(out, stored); /* a shard's is short, and the other was an object's before */
}

bool place_parse(const struct placing *p, const char *stored, unsigned node, char *name,
		 struct place *at, unsigned *r)
{
	uint64_t shard, replica;

	if (parse_block(stored, &shard, &replica)) {
		(void)snprintf(name, OBJ_NAME_MAX + 1, "block-%" PRIu64, shard);
		if (place_name(p, name, at) != 0 || replica >= at->n || at->node[replica] != node)
			return false;
		*r = (unsigned)replica;
		return true;
	}
	/* A shard without a replica number is another program's. */
	if (strlen(stored) > OBJ_NAME_MAX || place_name(p, stored, at) != 0 || at->is_shard)
		return false;
	(void)snprintf(name, OBJ_NAME_MAX + 1, "%s", stored);
	*r = node;
	return true;
}

void record_prefix(char out[RECORD_LEN], const char *name, unsigned r)
{
	(void)snprintf(out, RECORD_LEN, RECORD_PREFIX "%s-%u-", name, r);
}

int record_name(struct obj *out, const char *name, unsigned r, uint64_t seq)
{
	char stored[OBJ_NAME_MAX + 64];

	(void)snprintf(stored, sizeof(stored), RECORD_PREFIX "%s-%u-%" PRIu64, name, r, seq);
	return obj_set(out, stored);
}

bool record_parse(const char *stored, char *name, unsigned *r, uint64_t *seq)
{
	size_t skip = strlen(RECORD_PREFIX);
	const char *last, *before, *end;
	uint64_t holder;

	if (strncmp(stored, RECORD_PREFIX, skip) != 0 || strlen(stored) > OBJ_NAME_MAX)
		return false;
	/* From the right: the name itself may hold dashes. */
	last = strrchr(stored, '-');
	before = memrchr(stored, '-', (size_t)(last - stored));
	if (before == NULL || before < stored + skip + 1)
		return false;
	end = take_number(last + 1, seq);
	if (end == NULL || *end != '\0' || take_number(before + 1, &holder) != last ||
	    holder >= NODES_MAX)
		return false;
	memcpy(name, stored + skip, (size_t)(before - stored) - skip);
	name[(size_t)(before - stored) - skip] = '\0';
	*r = (unsigned)holder;
	return true;
}
