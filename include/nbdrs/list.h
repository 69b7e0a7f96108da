/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Intrusive doubly linked list. A list head is a node that points at itself when empty. A node that is
 * on no list points at itself too (list_init), so list_del may be called twice.
 */
#ifndef NBDRS_LIST_H
#define NBDRS_LIST_H

#include <stdbool.h>

#include "nbdrs/cleanup.h"

struct list {
	struct list *next, *prev;
};

#define LIST_INIT(name) { &(name), &(name) }

static inline void list_init(struct list *l)
{
	l->next = l->prev = l;
}

static inline bool list_empty(const struct list *l)
{
	return l->next == l;
}

/* Adds `n` at the end of `head`. */
static inline void list_add(struct list *head, struct list *n)
{
	n->prev = head->prev;
	n->next = head;
	head->prev->next = n;
	head->prev = n;
}

/* Adds `n` at the front of `head`. */
static inline void list_push(struct list *head, struct list *n)
{
	list_add(head->next, n);
}

static inline void list_del(struct list *n)
{
	n->prev->next = n->next;
	n->next->prev = n->prev;
	list_init(n);
}

/* Takes the first node off; NULL when empty. */
static inline struct list *list_pop(struct list *head)
{
	struct list *n = head->next;

	if (n == head)
		return NULL;
	list_del(n);
	return n;
}

/* Moves all nodes of `from`, which is not empty, to the uninitialised head `to`. */
static inline void list_take(struct list *to, struct list *from)
{
	*to = *from;
	to->next->prev = to;
	to->prev->next = to;
	list_init(from);
}

#define list_entry(ptr, type, member) container_of(ptr, type, member)

/* Safe against removal of the current entry, not of the next one. */
#define list_for_each(pos, head, type, member)                                                     \
	for (type *pos = list_entry((head)->next, type, member),                                   \
		  *pos##_next = list_entry(pos->member.next, type, member);                        \
	     &pos->member != (head);                                                               \
	     pos = pos##_next, pos##_next = list_entry(pos->member.next, type, member))

#endif
