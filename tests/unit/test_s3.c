/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The pure parts of S3: targets, encoding, signatures, XML. What goes over a
 * network is in test_s3_client.c.
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

#include "nbdrs/cleanup.h"
#include "nbdrs/s3.h"

/* --- Targets ---------------------------------------------------------------------------------- */

static bool same(const char *a, const char *b)
{
	return a && b ? strcmp(a, b) == 0 : a == b;
}

static void test_url(void **state)
{
	static const struct {
		const char *target, *scheme, *host, *key, *secret, *key_file, *bucket, *path;
	} good[] = {
		{ "http://K:S@h:9000/b/p/", "http", "h:9000", "K", "S", NULL, "b", "p/" },
		{ "https://K:S@s3.Example.ORG/b", "https", "s3.example.org", "K", "S", NULL, "b",
		  "" },
		{ "HTTP://K:S@h/b/", "http", "h", "K", "S", NULL, "b", "" },
		{ "http://h/b/a/b.img", "http", "h", NULL, NULL, NULL, "b", "a/b.img" },
		{ "http://h:80/b", "http", "h", NULL, NULL, NULL, "b", "" },
		{ "https://h:443/b", "https", "h", NULL, NULL, NULL, "b", "" },
		{ "https://h:80/b", "https", "h:80", NULL, NULL, NULL, "b", "" },
		{ "http://[::1]:9000/b", "http", "[::1]:9000", NULL, NULL, NULL, "b", "" },
		{ "http://[fe80::A]/b", "http", "[fe80::a]", NULL, NULL, NULL, "b", "" },
		{ "http://10.0.0.1/b", "http", "10.0.0.1", NULL, NULL, NULL, "b", "" },
		/* A ":" in the key, in the secret; signs that are pasted as they are. */
		{ "http://a%3Ab:S@h/b", "http", "h", "a:b", "S", NULL, "b", "" },
		{ "http://K:a:b@h/b", "http", "h", "K", "a:b", NULL, "b", "" },
		{ "http://K:a/b+c=@h:1/b/x", "http", "h:1", "K", "a/b+c=", NULL, "b", "x" },
		{ "http://K:%2f%2F%25%40@h/b", "http", "h", "K", "//%@", NULL, "b", "" },
		{ "http://K:a@b@h/b", "http", "h", "K", "a@b", NULL, "b", "" },
		/* An "@" behind the host is none of the userinfo's. */
		{ "http://h/b/x@y", "http", "h", NULL, NULL, NULL, "b", "x@y" },
		{ "http://h:9000/b/x@y:z", "http", "h:9000", NULL, NULL, NULL, "b", "x@y:z" },
		{ "http://K:S@h/b/x@y", "http", "h", "K", "S", NULL, "b", "x@y" },
		{ "http://@/etc/keys@h:1/b/x@y", "http", "h:1", NULL, NULL, "/etc/keys", "b",
		  "x@y" },
		{ "http://@/a%40b@h/b", "http", "h", NULL, NULL, "/a@b", "b", "" },
		{ "http://@rel@h/b", "http", "h", NULL, NULL, "rel", "b", "" },
		{ "/b/p/", NULL, NULL, NULL, NULL, NULL, "b", "p/" },
		{ "/b", NULL, NULL, NULL, NULL, NULL, "b", "" },
		{ "/b//x", NULL, NULL, NULL, NULL, NULL, "b", "/x" },
		{ "/b/a%20b%3F%25", NULL, NULL, NULL, NULL, NULL, "b", "a b?%" },
		{ "/t%3Ab/\xc3\xa4", NULL, NULL, NULL, NULL, NULL, "t:b", "\xc3\xa4" },
	};

	for (size_t i = 0; i < ARRAY_LEN(good); i++) {
		struct s3_url u;
		struct err err = { "" };

		if (s3_url_parse(good[i].target, &u, &err) != 0)
			fail_msg("%s: %s", good[i].target, err.msg);
		if (!same(u.scheme, good[i].scheme) || !same(u.host, good[i].host) ||
		    !same(u.key, good[i].key) || !same(u.secret, good[i].secret) ||
		    !same(u.key_file, good[i].key_file) || !same(u.bucket, good[i].bucket) ||
		    !same(u.path, good[i].path))
			fail_msg("%s: host %s bucket %s path %s", good[i].target, u.host, u.bucket,
				 u.path);
		s3_url_free(&u);
	}
}

static void test_bad_url(void **state)
{
	static const struct {
		const char *target, *word;
	} bad[] = {
		{ "", "neither" },
		{ "b/p", "neither" },
		{ "ftp://h/b", "neither" },
		{ "http:/h/b", "neither" },
		{ "http://", "host" },
		{ "http://h", "bucket" },
		{ "http://h/", "bucket" },
		{ "http://h//x", "bucket" },
		{ "/", "bucket" },
		{ "//b", "bucket" },
		{ "http://:S1KRIT@h/b", "empty" },
		{ "http://S1KRIT:@h/b", "empty" },
		{ "http://S1KRIT@h/b", "no \":\"" },
		{ "http://K:S1KRIT%2@h/b", "hex digits" },
		{ "http://K:S1KRIT%@h/b", "hex digits" },
		{ "http://K:S1KRIT%0A@h/b", "hex digits" },
		{ "http://K:S1KRIT@/b", "host" },
		{ "http://K:S1KRIT@h:0/b", "host" },
		{ "http://K:S1KRIT@h:65536/b", "host" },
		{ "http://K:S1KRIT@h:/b", "host" },
		{ "http://K:S1KRIT@h:9000000/b", "host" },
		{ "http://K:S1KRIT@h h/b", "host" },
		{ "http://K:S1KRIT@[::1/b", "host" },
		{ "http://K:S1KRIT@[]/b", "host" },
		{ "http://K:S1KRIT@[::1]x/b", "host" },
		{ "http://@h/b", "file with the keys" },
		{ "http://@@h/b", "file with the keys" },
		{ "http://h/b?x=S1KRIT", "query" },
		{ "http://h/b/%zz", "hex digits" },
		{ "http://h/b/%00", "control" },
		{ "http://h/a%2Fb/x", "bucket's name" },
		{ "http://h/../x", "bucket's name" },
	};
	_cleanup_free_ char *longest = calloc(1, S3_KEY_MAX + 10);
	struct s3_url u;
	struct err err;

	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		err.msg[0] = '\0';
		if (s3_url_parse(bad[i].target, &u, &err) != -EINVAL)
			fail_msg("%s was taken", bad[i].target);
		if (!strstr(err.msg, bad[i].word) || strstr(err.msg, "S1KRIT"))
			fail_msg("%s: %s", bad[i].target, err.msg);
	}
	memset(longest, 'x', S3_KEY_MAX + 4);
	memcpy(longest, "/b/", 3);
	assert_int_equal(s3_url_parse(longest, &u, &err), -EINVAL);
	longest[S3_KEY_MAX + 3] = '\0';
	assert_int_equal(s3_url_parse(longest, &u, &err), 0);
	s3_url_free(&u);
}

static void test_endpoint(void **state)
{
	static const char *const bad[] = { "nonsense",     "http://",    "ftp://h", "http://h/x",
					   "http://k:s@h", "http://h:x", "" };
	char *scheme, *host;
	struct err err;

	assert_int_equal(s3_endpoint_parse("http://Host:9000/", "X", &scheme, &host, &err), 0);
	assert_string_equal(scheme, "http");
	assert_string_equal(host, "host:9000");
	free(scheme);
	free(host);
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		assert_int_equal(s3_endpoint_parse(bad[i], "AWS_X", &scheme, &host, &err), -EINVAL);
		assert_non_null(strstr(err.msg, "AWS_X"));
		assert_null(strstr(err.msg, "k:s@"));
	}
}

static void test_style(void **state)
{
	assert_true(s3_wants_path_style("127.0.0.1:9000"));
	assert_true(s3_wants_path_style("[::1]"));
	assert_true(s3_wants_path_style("minio.example.org"));
	assert_true(s3_wants_path_style("s3.amazonaws.com:444"));
	assert_true(s3_wants_path_style("amazonaws.com"));
	assert_false(s3_wants_path_style("s3.amazonaws.com"));
	assert_false(s3_wants_path_style("s3.eu-west-1.amazonaws.com"));
	assert_false(s3_wants_path_style("s3.cn-north-1.amazonaws.com.cn"));
	assert_true(s3_bucket_fits_host("my-bucket", true));
	assert_true(s3_bucket_fits_host("my.bucket", false));
	assert_false(s3_bucket_fits_host("my.bucket", true));
	assert_false(s3_bucket_fits_host("my..bucket", false));
	assert_false(s3_bucket_fits_host(".bucket", false));
	assert_false(s3_bucket_fits_host("My-bucket", false));
	assert_false(s3_bucket_fits_host("my_bucket", false));
	assert_false(s3_bucket_fits_host("ab", false));
	assert_false(s3_bucket_fits_host("-ab", false));
	assert_false(s3_bucket_fits_host("t:b", false));
}

static void test_encode(void **state)
{
	static const struct {
		const char *in, *path, *value;
	} cases[] = {
		{ "", "", "" },
		{ "AZaz09-._~", "AZaz09-._~", "AZaz09-._~" },
		{ "a/b c", "a/b%20c", "a%2Fb%20c" },
		{ ":'()!*+%", "%3A%27%28%29%21%2A%2B%25", "%3A%27%28%29%21%2A%2B%25" },
		{ "?&=;,@$#\"", "%3F%26%3D%3B%2C%40%24%23%22", "%3F%26%3D%3B%2C%40%24%23%22" },
		{ "\xc3\xa4\xff\x01", "%C3%A4%FF%01", "%C3%A4%FF%01" },
	};
	char out[128];

	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		size_t len = strlen(cases[i].in);

		assert_int_equal(s3_encode(cases[i].in, len, true, out), strlen(cases[i].path));
		assert_string_equal(out, cases[i].path);
		assert_int_equal(s3_encode(cases[i].in, len, false, out), strlen(cases[i].value));
		assert_string_equal(out, cases[i].value);
	}
}

/* --- Signatures ------------------------------------------------------------------------------- */

static void expect_signature(struct s3_signer *s, const struct s3_creds *creds,
			     const struct s3_to_sign *what, const char *names,
			     const char *signature)
{
	char auth[S3_AUTH_MAX], want[S3_AUTH_MAX];

	(void)snprintf(
		want, sizeof(want),
		"AWS4-HMAC-SHA256 Credential=%s/%.8s/%s/%s/aws4_request, SignedHeaders=%s, Signature=%s",
		creds->key, what->date, what->region, what->service, names, signature);
	assert_int_equal(s3_sign(s, creds, what, auth, sizeof(auth)), 0);
	assert_string_equal(auth, want);
}

#define EMPTY_HASH "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

/* Amazon's test suite for Signature Version 4: service "service", no x-amz-content-sha256. */
static void test_sign_suite(void **state)
{
	static const struct {
		const char *method, *path, *query, *signature;
	} cases[] = {
		{ "GET", "/", "",
		  "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31" },
		{ "GET", "/", "Param1=value1",
		  "a67d582fa61cc504c4bae71f336f98b97f1ea3c7a6bfe1b6e45aec72011b9aeb" },
		{ "GET", "/", "Param1=value1&Param2=value2",
		  "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500" },
		{ "GET", "/%E1%88%B4", "",
		  "8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85" },
		{ "GET", "/-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", "",
		  "07ef7494c76fa4850883e2b006601f940f8a34d404d0cfa977f52a65bbf5f24f" },
		{ "POST", "/", "",
		  "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b" },
	};
	static const struct http_header headers[] = { { "x-amz-date", "20150830T123600Z" },
						      { "host", "example.amazonaws.com" } };
	static const struct http_header trim[] = { { "my-header2", " \"a   b   c\" " },
						   { "my-header1", " value1" },
						   { "x-amz-date", "20150830T123600Z" },
						   { "host", "example.amazonaws.com" } };
	char key[] = "AKIDEXAMPLE", secret[] = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
	const struct s3_creds creds = { .key = key, .secret = secret };
	struct s3_signer signer = { 0 };
	struct s3_to_sign what = { .headers = headers,
				   .headers_n = 2,
				   .payload = EMPTY_HASH,
				   .region = "us-east-1",
				   .service = "service",
				   .date = "20150830T123600Z" };

	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		what.method = cases[i].method;
		what.path = cases[i].path;
		what.query = cases[i].query;
		expect_signature(&signer, &creds, &what, "host;x-amz-date", cases[i].signature);
	}
	what.method = "GET";
	what.path = "/";
	what.query = "";
	what.headers = trim;
	what.headers_n = 4;
	expect_signature(&signer, &creds, &what, "host;my-header1;my-header2;x-amz-date",
			 "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736");
}

/* The examples of the Amazon S3 API reference. */
static void test_sign_s3(void **state)
{
	static const struct http_header get[] = { { "host", "examplebucket.s3.amazonaws.com" },
						  { "x-amz-content-sha256", EMPTY_HASH },
						  { "x-amz-date", "20130524T000000Z" },
						  { "range", "bytes=0-9" } };
	static const char hash[] =
		"44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072";
	static const struct http_header put[] = { { "host", "examplebucket.s3.amazonaws.com" },
						  { "date", "Fri, 24 May 2013 00:00:00 GMT" },
						  { "x-amz-storage-class", "REDUCED_REDUNDANCY" },
						  { "x-amz-date", "20130524T000000Z" },
						  { "x-amz-content-sha256", hash } };
	char key[] = "AKIAIOSFODNN7EXAMPLE", secret[] = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY";
	const struct s3_creds creds = { .key = key, .secret = secret };
	struct s3_signer signer = { 0 };
	struct s3_to_sign what = { .method = "GET",
				   .path = "/test.txt",
				   .query = "",
				   .headers = get,
				   .headers_n = 4,
				   .payload = EMPTY_HASH,
				   .region = "us-east-1",
				   .service = "s3",
				   .date = "20130524T000000Z" };

	expect_signature(&signer, &creds, &what, "host;range;x-amz-content-sha256;x-amz-date",
			 "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41");
	what.path = "/";
	what.query = "lifecycle=";
	what.headers_n = 3;
	expect_signature(&signer, &creds, &what, "host;x-amz-content-sha256;x-amz-date",
			 "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543");
	what.query = "max-keys=2&prefix=J";
	expect_signature(&signer, &creds, &what, "host;x-amz-content-sha256;x-amz-date",
			 "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7");
	what = (struct s3_to_sign){ .method = "PUT",
				    .path = "/test%24file.text",
				    .query = "",
				    .headers = put,
				    .headers_n = 5,
				    .payload = hash,
				    .region = "us-east-1",
				    .service = "s3",
				    .date = "20130524T000000Z" };
	expect_signature(&signer, &creds, &what,
			 "date;host;x-amz-content-sha256;x-amz-date;x-amz-storage-class",
			 "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd");
}

/* The kept signing key belongs to one day, region and pair of keys. */
static void test_sign_cache(void **state)
{
	static const struct http_header headers[] = { { "host", "h" } };
	char key[] = "K", secret[] = "S", secret2[] = "T";
	const struct s3_creds one = { .key = key, .secret = secret },
			      two = { .key = key, .secret = secret2 };
	const struct {
		const struct s3_creds *creds;
		const char *date, *region;
	} steps[] = { { &one, "20150830T235959Z", "a" },
		      { &one, "20150831T000000Z", "a" },
		      { &one, "20150831T000000Z", "b" },
		      { &two, "20150831T000000Z", "b" },
		      { &one, "20150830T235959Z", "a" } };
	struct s3_signer kept = { 0 };

	for (size_t i = 0; i < ARRAY_LEN(steps); i++) {
		struct s3_signer fresh = { 0 };
		const struct s3_to_sign what = { .method = "GET",
						 .path = "/",
						 .query = "",
						 .headers = headers,
						 .headers_n = 1,
						 .payload = EMPTY_HASH,
						 .region = steps[i].region,
						 .service = "s3",
						 .date = steps[i].date };
		char a[S3_AUTH_MAX], b[S3_AUTH_MAX];

		assert_int_equal(s3_sign(&kept, steps[i].creds, &what, a, sizeof(a)), 0);
		assert_int_equal(s3_sign(&fresh, steps[i].creds, &what, b, sizeof(b)), 0);
		assert_string_equal(a, b);
		assert_int_equal(s3_sign(&kept, steps[i].creds, &what, a, 100), -E2BIG);
	}
}

static void test_hash(void **state)
{
	char text[] = "Welcome to Amazon S3.", out[S3_HASH_LEN + 1], date[S3_DATE_LEN + 1], md5[32];
	struct iovec v[2] = { { text, 8 }, { text + 8, strlen(text) - 8 } };
	struct iov iov = { v, 2, strlen(text) };

	assert_int_equal(s3_md5_hex(&iov, out), 0);
	assert_string_equal(out, "d447d0e8f289f16a12ff6027ce77c258");
	assert_int_equal(s3_hash(&iov, out), 0);
	assert_string_equal(out,
			    "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072");
	assert_int_equal(s3_hash(NULL, out), 0);
	assert_string_equal(out, EMPTY_HASH);
	assert_int_equal(s3_md5("", 0, md5), 0);
	assert_string_equal(md5, "1B2M2Y8AsgTpgAmY7PhCfg==");
	s3_date(1440938160, date);
	assert_string_equal(date, "20150830T123600Z");
}

/* --- XML -------------------------------------------------------------------------------------- */

struct seen {
	char text[1024];
	int rc; /* what the callback answers */
};

static int note_key(void *arg, const char *key, uint64_t size, const char *etag)
{
	struct seen *s = arg;
	size_t at = strlen(s->text);

	/* "x" is that of ITEM. */
	(void)snprintf(s->text + at, sizeof(s->text) - at, "%s=%llu%s%s;", key,
		       (unsigned long long)size, strcmp(etag, "x") == 0 ? "" : " etag ",
		       strcmp(etag, "x") == 0 ? "" : etag);
	return s->rc;
}

static void note_failure(void *arg, const char *key, const char *code, const char *message)
{
	struct seen *s = arg;
	size_t at = strlen(s->text);

	(void)snprintf(s->text + at, sizeof(s->text) - at, "%s %s %s;", key, code, message);
}

#define LIST(inside)                                                               \
	"<?xml version=\"1.0\"?><ListBucketResult xmlns=\"http://s3/doc\">" inside \
	"</ListBucketResult>"
#define ITEM(key, size) \
	"<Contents><Key>" key "</Key><ETag>\"x\"</ETag><Size>" size "</Size></Contents>"

static void test_xml_list(void **state)
{
	static const struct {
		const char *text, *seen, *token;
		int rc;
	} cases[] = {
		{ LIST(""), "", NULL, 0 },
		{ LIST("<IsTruncated>false</IsTruncated>" ITEM("a", "1")
			       ITEM("b/c", "18446744073709551615")),
		  "a=1;b/c=18446744073709551615;", NULL, 0 },
		{ LIST(ITEM("a&amp;b &lt;&#x41;", "0")), "a&b <A=0;", NULL, 0 },
		{ LIST("<EncodingType>url</EncodingType>" ITEM("a%20b+c%2Bd%26", "7")),
		  "a b c+d&=7;", NULL, 0 },
		{ LIST(ITEM("a%20b+c", "7")), "a%20b+c=7;", NULL, 0 },
		{ LIST(ITEM("a",
			    "1") "<EncodingType>url</EncodingType><IsTruncated>true</IsTruncated>"
				 "<NextContinuationToken>t/+=</NextContinuationToken>"),
		  "a=1;", "t/+=", 0 },
		{ LIST("<Contents><Key>a</Key><Size>1</Size><ETag>&quot;0f-2&quot;</ETag></Contents>"
			       "<Contents><Key>b</Key><Size>1</Size><ETag>0f</ETag></Contents>"
			       "<Contents><Key>c</Key><Size>1</Size></Contents>"
			       "<Contents><Key>d</Key><Size>1</Size><ETag>W/&quot;0f&quot;</ETag></Contents>"
			       "<Contents><Key>e</Key><Size>1</Size><ETag>&quot;</ETag></Contents>"
			       "<Contents><Key>f</Key><Size>1</Size><ETag>&quot;&quot;</ETag></Contents>"),
		  "a=1 etag 0f-2;b=1 etag 0f;c=1 etag ;d=1 etag ;e=1 etag ;f=1 etag ;", NULL, 0 },
		{ LIST("<CommonPrefixes><Prefix>x/</Prefix></CommonPrefixes><Name>b</Name><KeyCount>0</KeyCount>"),
		  "", NULL, 0 },
		{ LIST("<IsTruncated>true</IsTruncated>"), NULL, NULL, -EPROTO },
		{ LIST("<EncodingType>url</EncodingType>" ITEM("a%00b", "7")), NULL, NULL,
		  -EPROTO },
		{ LIST("<Contents><Key>a</Key></Contents>"), NULL, NULL, -EPROTO },
		{ LIST("<Contents><Size>1</Size></Contents>"), NULL, NULL, -EPROTO },
		{ LIST(ITEM("a", "-1")), NULL, NULL, -EPROTO },
		{ LIST(ITEM("a", "")), NULL, NULL, -EPROTO },
		{ LIST(ITEM("a",
			    "1") "<a><b><c><d><e><f><g><h><i/></h></g></f></e></d></c></b></a>"),
		  NULL, NULL, -EPROTO },
		{ "<Error><Code>NoSuchBucket</Code></Error>", NULL, NULL, -EPROTO },
		{ "", NULL, NULL, -EPROTO },
		{ "hello", NULL, NULL, -EPROTO },
		{ "<ListBucketResult><Contents>", NULL, NULL, -EPROTO },
		{ "<!DOCTYPE x [<!ENTITY a \"b\">]><ListBucketResult/>", NULL, NULL, -EPROTO },
	};

	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		struct seen seen = { "", 0 };
		struct s3_page page;
		int rc = s3_xml_list(cases[i].text, strlen(cases[i].text), &page, note_key, &seen);

		if (rc != cases[i].rc)
			fail_msg("%s: %d", cases[i].text, rc);
		if (!rc) {
			assert_string_equal(seen.text, cases[i].seen);
			assert_true(same(page.token, cases[i].token));
			assert_int_equal(page.is_truncated, cases[i].token != NULL);
		} else {
			assert_string_equal(seen.text, ""); /* all of a page or nothing */
		}
		free(page.token);
	}
}

static void test_xml_list_ends(void **state)
{
	static const char text[] = LIST(ITEM("a", "1") ITEM("b", "2"));
	struct seen seen = { "", -ECANCELED };
	struct s3_page page;

	assert_int_equal(s3_xml_list(text, strlen(text), &page, note_key, &seen), -ECANCELED);
	assert_string_equal(seen.text, "a=1;");
	free(page.token);
}

static void test_xml_error(void **state)
{
	static const char text[] =
		"<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>AccessDenied</Code>"
		"<Message>No\nway</Message><Region>eu-1</Region><Detail><Code>x</Code></Detail></Error>";
	static const char *const none[] = { "", "<html><body>502</body></html>", "<Error><Code>Cut",
					    "x" };
	struct s3_error e;

	s3_xml_error(text, strlen(text), &e);
	assert_string_equal(e.code, "AccessDenied");
	assert_string_equal(e.message, "No way");
	assert_string_equal(e.region, "eu-1");
	for (size_t i = 0; i < ARRAY_LEN(none); i++) {
		s3_xml_error(none[i], strlen(none[i]), &e);
		assert_string_equal(e.code, "");
		assert_string_equal(e.message, "");
	}
	s3_xml_error(NULL, 0, &e);
	assert_string_equal(e.code, "");
}

static void test_xml_delete(void **state)
{
	static const char text[] =
		"<DeleteResult><Deleted><Key>a</Key></Deleted>"
		"<Error><Key>b&amp;</Key><Code>AccessDenied</Code><Message>no</Message></Error>"
		"<Error><Key>c</Key></Error></DeleteResult>";
	struct seen seen = { "", 0 };
	struct obj objs[2];
	char *body;
	size_t len;

	assert_int_equal(s3_xml_deleted(text, strlen(text), note_failure, &seen), 0);
	assert_string_equal(seen.text, "b& AccessDenied no;c  ;");
	assert_int_equal(s3_xml_deleted("<DeleteResult/>", 15, note_failure, &seen), 0);
	assert_int_equal(s3_xml_deleted("<Error/>", 8, note_failure, &seen), -EPROTO);
	assert_int_equal(s3_xml_deleted(NULL, 0, note_failure, &seen), -EPROTO);
	assert_int_equal(obj_set(&objs[0], "<&>\"'"), 0);
	assert_int_equal(obj_set(&objs[1], "block-1"), 0);
	assert_int_equal(s3_xml_delete("p/", objs, 2, &body, &len), 0);
	assert_int_equal(
		strncmp(body,
			"<Delete><Quiet>true</Quiet><Object><Key>p/&lt;&amp;&gt;&quot;&apos;</Key></Object>"
			"<Object><Key>p/block-1</Key></Object></Delete>",
			len),
		0);
	free(body);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_url),           cmocka_unit_test(test_bad_url),
		cmocka_unit_test(test_endpoint),      cmocka_unit_test(test_style),
		cmocka_unit_test(test_encode),        cmocka_unit_test(test_sign_suite),
		cmocka_unit_test(test_sign_s3),       cmocka_unit_test(test_sign_cache),
		cmocka_unit_test(test_hash),          cmocka_unit_test(test_xml_list),
		cmocka_unit_test(test_xml_list_ends), cmocka_unit_test(test_xml_error),
		cmocka_unit_test(test_xml_delete),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
