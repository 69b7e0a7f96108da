/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The I/O around the negotiation: greeting, then option by option. An idle client costs its fiber and
 * nothing else: buffers are borrowed from the pool while an option is answered. Each answer leaves in one
 * send, or Nagle and delayed ACKs would cost 40 ms a handshake on TCP.
 *
 * What a client can cost is bounded by the deadline, by HANDSHAKE_BYTES_MAX, and by yielding between
 * options, so that one who never pauses does not hold up the others.
 */
#include <errno.h>
#include <stdatomic.h>

#include "net/handshake.h"
#include "net/negotiate.h"
#include "nbdrs/buf.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"
#include "nbdrs/log.h"
#include "nbdrs/proto.h"

enum {
	CLIENT_FLAGS_LEN = 4,
	HANDSHAKE_BYTES_MAX = 32 << 20, /* of all options together */
	DRAIN_CHUNK = 16384,
	OPTIONS_AT_ONCE = 8, /* options answered before others get a turn */
	NAME_LOG_MAX = 64,   /* bytes of a client's text in a log line */
};

struct handshake {
	struct nego nego;
	int fd;
	const char *peer;
	uint64_t deadline_ns;
	uint64_t bytes; /* of options so far */
	unsigned options_n;
};

/* Set once, by whoever ends the server; each option is answered by what it says then. */
static atomic_bool is_ending;

static const struct nego_source source = { export_find_n, export_first };

void handshake_shutdown(void)
{
	atomic_store(&is_ending, true);
}

/*
 * The client's flags and its first option's header, which every client must send next, so both are
 * taken by one call when they are there; the flags are judged as soon as they have come.
 */
CO_FN static int read_start(struct handshake *h, struct nego_option *o)
{
	uint8_t wire[CLIENT_FLAGS_LEN + NBD_OPT_HEADER_LEN];
	size_t have = 0;
	bool is_judged = false;

	while (have < sizeof(wire)) {
		ssize_t n = io_recv(h->fd, wire + have, sizeof(wire) - have, h->deadline_ns);

		if (n <= 0)
			return n ? (int)n : -ECONNRESET;
		have += (size_t)n;
		if (have < CLIENT_FLAGS_LEN || is_judged)
			continue;
		if (!nego_client_flags(&h->nego, get_be32(wire)))
			return -EPROTO;
		is_judged = true;
	}
	return nego_parse_option(wire + CLIENT_FLAGS_LEN, o) ? 0 : -EPROTO;
}

CO_FN static int read_header(struct handshake *h, struct nego_option *o)
{
	uint8_t wire[NBD_OPT_HEADER_LEN];
	int rc = io_recv_full(h->fd, wire, sizeof(wire), h->deadline_ns);

	if (rc < 0)
		return rc;
	return nego_parse_option(wire, o) ? 0 : -EPROTO;
}

CO_FN static int drain(struct handshake *h, uint32_t len)
{
	void *buf = buf_get(DRAIN_CHUNK);
	int rc = buf ? 0 : -ENOMEM;

	while (rc == 0 && len) {
		uint32_t part = MIN(len, (uint32_t)DRAIN_CHUNK);

		rc = io_recv_full(h->fd, buf, part, h->deadline_ns);
		if (rc < 0)
			break;
		rc = 0;
		len -= part;
		co_yield();
	}
	buf_put(buf, DRAIN_CHUNK);
	return rc;
}

/* Says why an option was refused, or the connection closed. A client can repeat it at will. */
static void report(const struct handshake *h, uint32_t option)
{
	static struct log_gate gate; /* clients are negotiated with on one reactor */
	unsigned suppressed;

	if (!h->nego.wanted) {
		log_debug("option refused peer=%s option=%u reason=\"%s\"", h->peer, option,
			  h->nego.trouble);
		return;
	}
	if (log_gate_open(&gate, &suppressed))
		log_info("client asks for an unknown export peer=%s name=\"%.*s\" suppressed=%u",
			 h->peer, (int)MIN(h->nego.wanted_len, (size_t)NAME_LOG_MAX),
			 h->nego.wanted, suppressed);
}

/*
 * Answers with the data in `in`: NEGO_OPTION, NEGO_TRANSMIT, NEGO_BYE, or -errno when the connection must be
 * closed: -ENOENT for an unknown export where the protocol knows no error reply, -EPROTO for other reasons.
 */
CO_FN static int answer(struct handshake *h, const struct nego_option *o, const void *in)
{
	int next;

	h->nego.out = buf_get(NEGO_OUT_ROOM);
	if (!h->nego.out)
		return -ENOMEM;
	h->nego.is_ending = atomic_load(&is_ending);
	next = (int)nego_answer(&h->nego, o, in);
	if (h->nego.trouble)
		report(h, o->code);

	while (next != NEGO_CLOSE) {
		int rc = io_send_full(h->fd, h->nego.out, h->nego.out_n, h->deadline_ns);

		h->nego.out_n = 0;
		/* A client that says ABORT may be gone already, and that is fine. */
		if (rc < 0 && next != NEGO_BYE)
			next = rc;
		if (next != NEGO_MORE)
			break;
		next = (int)nego_more(&h->nego);
	}
	if (next == NEGO_CLOSE)
		next = h->nego.wanted ? -ENOENT : -EPROTO;
	h->nego.out_n = 0;
	buf_put(h->nego.out, NEGO_OUT_ROOM);
	h->nego.out = NULL;
	return next;
}

/* Takes the option's data off the stream and answers it; as answer(). */
CO_FN static int serve_option(struct handshake *h, const struct nego_option *o)
{
	size_t room = MAX(o->len, (uint32_t)1);
	void *in;
	int rc;

	h->bytes += NBD_OPT_HEADER_LEN + (uint64_t)o->len;
	if (h->bytes > HANDSHAKE_BYTES_MAX) {
		h->nego.trouble = "too many bytes of options";
		return -EPROTO;
	}
	if (!nego_wants_data(o)) {
		rc = o->len ? drain(h, o->len) : 0;
		if (rc < 0 && o->code != NBD_OPT_ABORT)
			return rc;
		return answer(h, o, NULL);
	}
	in = buf_get(room);
	if (!in)
		return -ENOMEM;
	rc = o->len ? io_recv_full(h->fd, in, o->len, h->deadline_ns) : 0;
	if (rc >= 0)
		rc = answer(h, o, in);
	h->nego.wanted = NULL; /* it points into `in` */
	buf_put(in, room);
	return rc;
}

/* Until the client chose: 0, or -errno as handshake(). */
CO_FN static int negotiate(struct handshake *h)
{
	struct nego_option o;
	int rc = io_send_full(h->fd, nego_greeting, NBD_GREETING_LEN, h->deadline_ns);

	if (rc >= 0)
		rc = read_start(h, &o);
	while (rc >= 0) {
		rc = serve_option(h, &o);
		if (rc < 0)
			break;
		switch ((enum nego_next)rc) {
		case NEGO_TRANSMIT: return 0;
		case NEGO_BYE: return -ECONNABORTED;
		case NEGO_OPTION:
		case NEGO_MORE: /* these two ended inside answer() */
		case NEGO_CLOSE: break;
		}
		/* Another option follows. A peer that never pauses never meets the deadline of a receive. */
		if (now_ns() >= h->deadline_ns)
			return -ETIMEDOUT;
		if (++h->options_n >= OPTIONS_AT_ONCE)
			co_yield();
		rc = read_header(h, &o);
	}
	return rc;
}

CO_FN int handshake(int fd, const char *peer, uint64_t deadline_ns, struct session *out)
{
	static struct log_gate gate; /* as in report() */
	struct handshake h = { .fd = fd, .peer = peer, .deadline_ns = deadline_ns };
	unsigned suppressed;
	int rc;

	nego_init(&h.nego, &source);
	rc = negotiate(&h);
	if (rc == 0) {
		*out = (struct session){
			.export = h.nego.chosen,
			.is_structured = h.nego.is_structured,
			.has_meta = h.nego.has_meta,
		};
		return 0;
	}
	if (rc == -EPROTO && atomic_load(&is_ending))
		rc = -ESHUTDOWN;
	if (rc == -ETIMEDOUT || rc == -EPROTO || rc == -ENOMEM) {
		if (log_gate_open(&gate, &suppressed))
			log_warn("negotiation failed peer=%s error=%s reason=\"%s\" suppressed=%u",
				 peer, err_name(rc), h.nego.trouble ? h.nego.trouble : "",
				 suppressed);
	} else {
		log_debug("negotiation ended peer=%s reason=%s", peer, err_name(rc));
	}
	return rc;
}
