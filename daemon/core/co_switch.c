/* SPDX-License-Identifier: GPL-3.0-or-later */
#include "core/co_switch.h"

#include <stdint.h>

#include "nbdrs/cleanup.h"

#ifdef CO_SWITCH_ASM

void co_switch_asm(void **save_sp, void *to_sp);

#if defined(__x86_64__)
/*
 * System V ABI: rbx, rbp, r12-r15 and the stack pointer belong to the callee's caller. The control
 * words of x87 and SSE do too, but nothing here ever changes them.
 */
__asm__(".text\n"
	".p2align 4\n"
	".globl co_switch_asm\n"
	".type co_switch_asm, @function\n"
	"co_switch_asm:\n"
	"	pushq %rbp\n"
	"	pushq %rbx\n"
	"	pushq %r12\n"
	"	pushq %r13\n"
	"	pushq %r14\n"
	"	pushq %r15\n"
	"	movq %rsp, (%rdi)\n"
	"	movq %rsi, %rsp\n"
	"	popq %r15\n"
	"	popq %r14\n"
	"	popq %r13\n"
	"	popq %r12\n"
	"	popq %rbx\n"
	"	popq %rbp\n"
	"	ret\n"
	".size co_switch_asm, . - co_switch_asm\n");

enum { SAVED_WORDS = 6 };

void co_ctx_init(struct co_ctx *ctx, void *stack, size_t len, void (*entry)(void))
{
	uintptr_t *sp = (uintptr_t *)align_down((uintptr_t)stack + len, 16);

	/* `ret` must leave the stack as a call does: 8 bytes off a multiple of 16, on a null return address. */
	*--sp = 0;
	*--sp = (uintptr_t)entry;
	for (int i = 0; i < SAVED_WORDS; i++)
		*--sp = 0;
	ctx->sp = sp;
}

#elif defined(__aarch64__)
/* AAPCS64: x19-x28, the frame pointer, the link register, sp and the low halves of v8-v15. */
__asm__(".text\n"
	".p2align 4\n"
	".globl co_switch_asm\n"
	".type co_switch_asm, %function\n"
	"co_switch_asm:\n"
	"	sub sp, sp, #160\n"
	"	stp x19, x20, [sp, #0]\n"
	"	stp x21, x22, [sp, #16]\n"
	"	stp x23, x24, [sp, #32]\n"
	"	stp x25, x26, [sp, #48]\n"
	"	stp x27, x28, [sp, #64]\n"
	"	stp x29, x30, [sp, #80]\n"
	"	stp d8, d9, [sp, #96]\n"
	"	stp d10, d11, [sp, #112]\n"
	"	stp d12, d13, [sp, #128]\n"
	"	stp d14, d15, [sp, #144]\n"
	"	mov x9, sp\n"
	"	str x9, [x0]\n"
	"	mov sp, x1\n"
	"	ldp x19, x20, [sp, #0]\n"
	"	ldp x21, x22, [sp, #16]\n"
	"	ldp x23, x24, [sp, #32]\n"
	"	ldp x25, x26, [sp, #48]\n"
	"	ldp x27, x28, [sp, #64]\n"
	"	ldp x29, x30, [sp, #80]\n"
	"	ldp d8, d9, [sp, #96]\n"
	"	ldp d10, d11, [sp, #112]\n"
	"	ldp d12, d13, [sp, #128]\n"
	"	ldp d14, d15, [sp, #144]\n"
	"	add sp, sp, #160\n"
	"	ret\n"
	".size co_switch_asm, . - co_switch_asm\n");

enum { FRAME_WORDS = 20, LINK_REGISTER = 11 };

void co_ctx_init(struct co_ctx *ctx, void *stack, size_t len, void (*entry)(void))
{
	uintptr_t *sp = (uintptr_t *)align_down((uintptr_t)stack + len, 16);

	sp -= FRAME_WORDS;
	for (int i = 0; i < FRAME_WORDS; i++)
		sp[i] = 0;
	sp[LINK_REGISTER] = (uintptr_t)entry;
	ctx->sp = sp;
}
#endif

void co_ctx_switch(struct co_ctx *from, struct co_ctx *to)
{
	co_switch_asm(&from->sp, to->sp);
}

#else /* ucontext */

void co_ctx_init(struct co_ctx *ctx, void *stack, size_t len, void (*entry)(void))
{
	(void)getcontext(&ctx->uc); /* cannot fail on Linux */
	ctx->uc.uc_stack.ss_sp = stack;
	ctx->uc.uc_stack.ss_size = len;
	ctx->uc.uc_link = NULL;
	makecontext(&ctx->uc, entry, 0);
}

void co_ctx_switch(struct co_ctx *from, struct co_ctx *to)
{
	(void)swapcontext(&from->uc, &to->uc); /* fails only for a bad context, which is our bug */
}

#endif
