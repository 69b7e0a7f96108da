/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * A connection's inside, shared by conn.c (life cycle), receive.c (bytes in, requests out), request.c
 * (what a request does) and reply.c (replies out).
 */
#ifndef NBDRS_CONN_INT_H
#define NBDRS_CONN_INT_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "nbdrs/conn.h"
#include "nbdrs/io.h"
#include "nbdrs/iov.h"
#include "nbdrs/layer.h"
#include "nbdrs/list.h"
#include "nbdrs/proto.h"
#include "nbdrs/reactor.h"

enum {
	RX_LEN = 256 * 1024,		 /* a receive buffer */
	CONN_MAX_REQUESTS = 1024,	 /* taken in and not yet answered, of one connection */
	CONN_MAX_BYTES = 64 << 20,	 /* payload of those; one request is always let in */
	CONN_MAX_RX = 512,		 /* receive buffers kept alive by requests */
	PAYLOAD_HARD_CAP = 128 << 20,	 /* a longer WRITE is not drained, the connection ends */
	TX_FLUSH_AT = 1 << 20,		 /* bytes of replies after which they leave at once */
	TX_IOV = 512,			 /* segments of one sendmsg */
};

/* Payload of all connections of the daemon; above it, connections with something in flight wait. */
#define DAEMON_MAX_BYTES (UINT64_C(1) << 30)

/* A receive buffer; writes point into it instead of copying. */
struct rxbuf {
	unsigned refs; /* the connection's own and one per request that points into it */
	char *data;    /* RX_LEN bytes */
};

struct conn;

/*
 * One request from header to sent reply. Memory: the struct from a pool; payload of a write in one or
 * two segments (tail of a receive buffer, own buffer); data of a read in its own buffer or lent.
 */
struct request {
	struct list node; /* tx queue, or the connection's `stalled` */
	struct conn *conn;
	struct nbd_request nbd;
	uint64_t started; /* ns */
	uint64_t charged; /* bytes on the connection's account */
	enum nbd_error error;

	struct rxbuf *rx;    /* holds the first payload segment; NULL = none */
	struct iovec seg[2]; /* payload of a write; data of a read is seg[0] */
	unsigned segs_n;
	void *data;	     /* own buffer (buf_get) of data_len, or NULL */
	size_t data_len;
	struct loan loan;    /* read served without a copy */

	/* The reply: header in `head`, then whatever; `more` is for replies of many segments. */
	uint8_t head[40];
	struct iovec tx[4];
	struct iovec *more;  /* malloc, tx_n of them; NULL = tx is used */
	void *more_heads;    /* malloc: chunk headers `more` points to */
	unsigned tx_n;
	size_t tx_len;
};

struct conn {
	struct list node; /* of the reactor's connections */
	uint64_t id;
	int fd;
	struct session s;
	struct nbd_limits limits;
	char peer[64];
	struct reactor *reactor;

	/* receiving */
	struct rxbuf *rx;	  /* NULL while idle */
	unsigned rx_fill, rx_pos; /* bytes in it, bytes parsed */
	unsigned rx_live;	  /* receive buffers alive, `rx` included */
	struct request *partial;  /* write whose payload is on its way ... */
	size_t partial_got;	  /* ... and how much of it is there */
	uint64_t discard;	  /* payload to be thrown away ... */
	struct request *refused;  /* ... before this is answered */
	uint64_t batch_ns;	  /* when the bytes came */
	void *left;		  /* received by the nbdrsd before this: taken before the socket's */
	size_t left_len, left_at;
	struct list stalled;	  /* no fiber could be had; tried again when one ends */

	/* sending */
	struct list tx;
	size_t tx_len, tx_off;	  /* bytes queued; bytes of the first reply that left */
	struct reactor_defer flush;

	/* accounts */
	unsigned in_flight;	  /* requests taken in, reply not sent yet */
	uint64_t in_flight_bytes;
	uint64_t requests;
	unsigned changing;	  /* of the kernel's: writes, zeroes and trims in the chain */
	bool is_ghost;		  /* cut while there were some */

	struct io_watch in, out;
	struct spinner spin;
	struct timer retry;	  /* of `stalled` when nothing is in flight */
	struct reactor_msg move;  /* on its way to another reactor */
	bool is_busy;		  /* counted in its reactor's busy_n */
	bool is_active;		  /* something came since the last look of the busy timer */
	bool is_reading;	  /* receive is on the stack: it flushes at its end */
	bool is_paused;		  /* over a limit: not read until replies left */
	bool is_ending;		  /* no more input: finish, answer, close */
	bool is_broken;		  /* the socket is dead: finish, drop the replies */
	bool is_draining;	  /* the daemon stops */
	bool must_look;		  /* `flush` shall receive, for once */
	bool is_held;		  /* not read until further notice, see conn_handover.c */
	bool tx_careful;	  /* after EFAULT: one reply per send, to find the one */
};

/* Connections of one reactor. */
struct conn_set {
	struct list conns;
	unsigned busy_n;
	bool is_draining, is_held;
	struct timer busy_timer;
	struct list free_requests;
	unsigned free_n;
	struct iovec tx_iov[TX_IOV]; /* of the send that is being made */
};

struct conn_set *conn_set_self(void);

/* conn.c: closes and frees `c` if it is ending or broken and nothing is left to wait for. True: it is gone. */
bool conn_try_close(struct conn *c);
struct handover_conn;
/* conn.c: frees `c`, which is still (conn_handover.c), and leaves its descriptor open. */
void conn_forget(struct conn *c);
/* conn.c: as conn_start, for a connection of the nbdrsd before this. Takes h->fd and h->left when it is 0; -ENOMEM. */
int conn_adopt(struct handover_conn *h, const struct session *s);
/* conn.c: it is paused; one of the kernel's is still looked at for being cut. */
void conn_watch_cut(struct conn *c);
/* conn.c: a request came: counts the connection as busy. */
void conn_mark_busy(struct conn *c);

/* receive.c: takes what the socket has, parses, dispatches, sends. True when anything came. */
bool conn_receive(struct conn *c);
/* receive.c: after replies left: goes on reading if it was paused. */
void conn_resume(struct conn *c);
/* receive.c: drops what was received in part. */
void conn_receive_abort(struct conn *c);
void rxbuf_put(struct conn *c, struct rxbuf *rx);
/* receive.c: takes the request's bytes off the accounts. */
void request_uncharge(struct request *r);

/* request.c */
struct request *request_new(struct conn *c, const struct nbd_request *nbd);
/* Gives back the payload's memory: a write's reply needs none of it. The account stays until the reply left. */
void request_drop_payload(struct request *r);
/* Gives back all memory and the account; the request was answered, or never will be. */
void request_free(struct request *r);
/* Serves it: the reply is queued at once or later. Takes r. */
void request_dispatch(struct request *r);
/* Queues the reply of a request that is not served. */
void request_refuse(struct request *r, enum nbd_error error);
void request_retry_stalled(struct conn *c);
void request_pool_free(struct conn_set *set);

/* ghost.c: may have been cut: see whether it leaves changes behind. */
void ghost_look(struct conn *c);
/* ghost.c: a change of a kernel connection begins, when no lost one's is left. False: it was cut itself meanwhile. */
CO_FN bool ghost_enter(struct conn *c);
/* ghost.c: it has ended. Only after ghost_enter was true. */
void ghost_leave(struct conn *c);

/* reply.c: builds the reply from r->error and the data, and queues it. Takes r. */
void reply_queue(struct request *r);
/* The same for a BLOCK_STATUS that went well. */
void reply_queue_map(struct request *r, const struct extmap *map);
/* Sends what the socket takes. */
void reply_flush(struct conn *c);
/* Frees all queued replies. */
void reply_drop(struct conn *c);

#endif
