/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The switch between two stacks: hand-written for x86_64 and aarch64 (swapcontext makes a system call,
 * 330 ns a pair against 21 ns), ucontext elsewhere or with -DCO_UCONTEXT.
 */
#ifndef NBDRS_CO_SWITCH_H
#define NBDRS_CO_SWITCH_H

#include <stddef.h>

#if (defined(__x86_64__) || defined(__aarch64__)) && !defined(CO_UCONTEXT)
#define CO_SWITCH_ASM 1
#else
#include <ucontext.h>
#endif

/* A suspended stack. */
struct co_ctx {
#ifdef CO_SWITCH_ASM
	void *sp;
#else
	ucontext_t uc;
#endif
};

/* Makes `ctx` start `entry` (which never returns) on the stack [stack, stack + len) when first switched to. */
void co_ctx_init(struct co_ctx *ctx, void *stack, size_t len, void (*entry)(void));

/* Saves the running stack into `from` and goes on in `to`. */
void co_ctx_switch(struct co_ctx *from, struct co_ctx *to);

#endif
