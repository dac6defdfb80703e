/* An S3 server that is never the bottleneck: large bodies are thrown away by the kernel, and sent by sendfile.

   server [-l MIB] PORT CONTENT [CERTIFICATE KEY]      listens on 127.0.0.1, until it is killed

   With -l each connection carries so many MiB a second, either way, as those of a store far away do.

   Small objects (up to SMALL bytes, or named *.json) are kept and given back as they came, with the conditions
   and the checksums that AWS keeps. Of a large one only the size is kept: asked for, it has the bytes of the file
   CONTENT at the same offsets, so whoever uploads that file gets it back. `GET /-/counts` tells how often
   each operation was asked, and how many bytes of bodies came in and went out, as JSON.

   Not here, because no client of the benchmarks asks for it: versions, copies, access control, signatures. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <openssl/evp.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    SMALL = 1 << 20, /* bytes of a body that is kept */
    HEAD = 1 << 16,  /* bytes of a request's head */
    CHUNK = 1 << 18, /* bytes that are moved at a time */
    BUCKETS = 1 << 14,
    PARTS = 10001,
    PAGE = 1000 /* keys of a listing */
};

static SSL_CTX *tls;
static double link_rate; /* bytes a second of each connection; 0: no limit */
static int content = -1;
static const char *content_bytes;
static uint64_t content_size;

/* --- CRC64NVME ----------------------------------------------------------------------------------------- */

static uint64_t crc_table[256];
static const uint64_t CRC_POLY = 0x9A6C9329AC4BC9B5ULL; /* reflected */

static void crc_init(void) {
    for (int n = 0; n < 256; n++) {
        uint64_t crc = (uint64_t)n;
        for (int k = 0; k < 8; k++) crc = crc & 1 ? crc >> 1 ^ CRC_POLY : crc >> 1;
        crc_table[n] = crc;
    }
}

static uint64_t crc_of(const char *data, size_t size) {
    uint64_t crc = ~0ULL;
    for (size_t i = 0; i < size; i++) crc = crc_table[(crc ^ (uint8_t)data[i]) & 0xff] ^ crc >> 8;
    return ~crc;
}

static uint64_t times(const uint64_t *matrix, uint64_t vector) {
    uint64_t sum = 0;
    for (; vector; vector >>= 1, matrix++)
        if (vector & 1) sum ^= *matrix;
    return sum;
}

static void square(uint64_t *to, const uint64_t *matrix) {
    for (int n = 0; n < 64; n++) to[n] = times(matrix, matrix[n]);
}

/* The checksum of two pieces, from those of each: the first is moved on over as many zeros as the second is long. */
static uint64_t crc_joined(uint64_t first, uint64_t second, uint64_t size) {
    uint64_t even[64], odd[64];
    odd[0] = CRC_POLY;
    for (int n = 1; n < 64; n++) odd[n] = 1ULL << (n - 1);
    square(even, odd);
    square(odd, even);
    for (;;) {
        square(even, odd);
        if (size & 1) first = times(even, first);
        if (!(size >>= 1)) break;
        square(odd, even);
        if (size & 1) first = times(odd, first);
        if (!(size >>= 1)) break;
    }
    return first ^ second;
}

static void crc_text(uint64_t crc, char *text) {
    unsigned char raw[8];
    for (int n = 0; n < 8; n++) raw[n] = (unsigned char)(crc >> (56 - 8 * n));
    EVP_EncodeBlock((unsigned char *)text, raw, 8);
}

static bool crc_read(const char *text, uint64_t *crc) {
    unsigned char raw[16];
    if (strlen(text) != 12 || EVP_DecodeBlock(raw, (const unsigned char *)text, 12) != 9) return false;
    *crc = 0;
    for (int n = 0; n < 8; n++) *crc = *crc << 8 | raw[n];
    return true;
}

/* --- what is kept -------------------------------------------------------------------------------------- */

typedef struct object {
    struct object *next;
    char *key, *body, *meta; /* no body: it is that of CONTENT */
    uint64_t size, crc;
    bool has_crc;
    char etag[48];
    time_t at;
} object;

typedef struct {
    uint64_t size, crc;
    bool there, has_crc;
} part;

typedef struct upload {
    struct upload *next;
    char *key, *meta, id[24];
    part parts[PARTS];
} upload;

static object *objects[BUCKETS];
static upload *uploads;
static uint64_t serial;
static pthread_mutex_t store = PTHREAD_MUTEX_INITIALIZER;

static uint32_t hash(const char *key) {
    uint32_t sum = 2166136261u;
    for (; *key; key++) sum = (sum ^ (uint8_t)*key) * 16777619u;
    return sum % BUCKETS;
}

static object **find(const char *key) {
    object **at = &objects[hash(key)];
    while (*at && strcmp((*at)->key, key)) at = &(*at)->next;
    return at;
}

static upload **find_upload(const char *id) {
    upload **at = &uploads;
    while (*at && strcmp((*at)->id, id)) at = &(*at)->next;
    return at;
}

static void drop(object **at) {
    object *gone = *at;
    *at = gone->next;
    free(gone->key);
    free(gone->body);
    free(gone->meta);
    free(gone);
}

static void drop_upload(upload **at) {
    upload *gone = *at;
    *at = gone->next;
    free(gone->key);
    free(gone->meta);
    free(gone);
}

/* --- a connection -------------------------------------------------------------------------------------- */

typedef struct {
    int fd;
    SSL *ssl;
    char buffer[HEAD + 1]; /* what was read, and is not used yet: from `at` to `end` */
    size_t at, end;
    double free_at; /* when the link has carried what it was given, in seconds */
    bool broken;
} peer;

/* Wait until the link has carried so many bytes more. */
static void carry(peer *it, uint64_t size) {
    if (!link_rate) return;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    double seconds = (double)now.tv_sec + (double)now.tv_nsec / 1e9;
    if (it->free_at < seconds) it->free_at = seconds;
    it->free_at += (double)size / link_rate;
    struct timespec then = {.tv_sec = (time_t)it->free_at};
    then.tv_nsec = (long)((it->free_at - (double)then.tv_sec) * 1e9);
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &then, NULL);
}

static ssize_t receive(peer *it, char *to, size_t size) {
    ssize_t got;
    do got = it->ssl ? SSL_read(it->ssl, to, (int)size) : recv(it->fd, to, size, 0);
    while (got < 0 && !it->ssl && errno == EINTR);
    if (got <= 0) it->broken = true;
    return got;
}

static void give(peer *it, const char *data, size_t size) {
    while (size && !it->broken) {
        size_t now = size < CHUNK ? size : CHUNK;
        ssize_t sent = it->ssl ? SSL_write(it->ssl, data, (int)now) : send(it->fd, data, now, MSG_NOSIGNAL);
        if (sent <= 0) it->broken = true;
        else data += sent, size -= (size_t)sent;
    }
}

static void give_content(peer *it, off_t offset, uint64_t size) {
    while (size && !it->broken) {
        uint64_t most = link_rate && size > CHUNK ? CHUNK : size;
        ssize_t sent = (ssize_t)most;
        if (it->ssl) {
            give(it, content_bytes + offset, most);
            offset += sent;
        } else sent = sendfile(it->fd, content, &offset, most);
        if (sent <= 0) it->broken = true;
        else size -= (uint64_t)sent, carry(it, (uint64_t)sent);
    }
}

/* Take exactly `size` bytes of the body into `to`, or throw them away. */
static void take(peer *it, char *to, uint64_t size) {
    static _Thread_local char waste[CHUNK];
    while (size && !it->broken) {
        size_t held = it->end - it->at;
        if (held) {
            if (held > size) held = (size_t)size;
            if (to) memcpy(to, it->buffer + it->at, held), to += held;
            it->at += held, size -= held;
            continue;
        }
        size_t now = size < CHUNK ? (size_t)size : CHUNK;
        ssize_t got;
        if (to || it->ssl) {
            got = receive(it, to ? to : waste, now);
        } else { /* the kernel throws it away, without a copy */
            uint64_t most = link_rate ? CHUNK : 1 << 22;
            got = recv(it->fd, NULL, size < most ? (size_t)size : most, MSG_TRUNC);
            if (got <= 0) it->broken = true;
        }
        if (got > 0) {
            size -= (uint64_t)got;
            if (to) to += got;
            else carry(it, (uint64_t)got);
        }
    }
}

/* Take a line that ends in CR LF, without it. */
static void take_line(peer *it, char *line, size_t most) {
    size_t size = 0;
    char last = 0;
    while (!it->broken) {
        char next;
        take(it, &next, 1);
        if (last == '\r' && next == '\n') break;
        if (size < most - 1) line[size++] = next;
        last = next;
    }
    line[size && !it->broken ? size - 1 : 0] = 0;
}

/* --- a request ----------------------------------------------------------------------------------------- */

typedef struct {
    char method[8], target[4096], key[2048], query[2048];
    uint64_t length;  /* of the body on the wire */
    uint64_t decoded; /* of what it carries */
    bool chunked, aws_chunked, expects, checksums, if_none_match, closes;
    char if_match[64], crc[16], meta[8192], range[64];
    char *body; /* of a small one */
    uint64_t sum; /* its checksum */
} request;

static atomic_ullong counts[16], came, went;
static const char *const NAMES[16] = {
    "put_object", "get_object", "head_object", "delete_object", "list_objects", "create_multipart_upload",
    "upload_part", "complete_multipart_upload", "abort_multipart_upload", "list_parts", "list_multipart_uploads",
    "other",
};
enum { PUT, GET, HEADED, DELETED, LIST, CREATE, PART, COMPLETE, ABORT, LIST_PARTS, LIST_UPLOADS, OTHER };

static void unescape(char *text) {
    char *to = text;
    for (; *text; text++) {
        unsigned byte;
        if (*text == '%' && sscanf(text + 1, "%2x", &byte) == 1) *to++ = (char)byte, text += 2;
        else *to++ = *text;
    }
    *to = 0;
}

/* Whether the query has that parameter; its value goes to `value`. */
static bool asked(const request *it, const char *name, char *value, size_t most) {
    size_t length = strlen(name);
    for (const char *at = it->query; at && *at; at = strchr(at, '&') ? strchr(at, '&') + 1 : NULL) {
        if (strncmp(at, name, length) || (at[length] && at[length] != '=' && at[length] != '&')) continue;
        if (value) {
            const char *from = at[length] == '=' ? at + length + 1 : "";
            size_t size = strcspn(from, "&");
            if (size >= most) size = most - 1;
            memcpy(value, from, size), value[size] = 0;
            unescape(value);
        }
        return true;
    }
    return false;
}

static void copied(char *to, size_t most, const char *from) {
    snprintf(to, most, "%s", from);
}

static void header(request *it, char *name, char *value) {
    if (!strcasecmp(name, "content-length")) it->length = strtoull(value, NULL, 10);
    else if (!strcasecmp(name, "x-amz-decoded-content-length")) {
        it->decoded = strtoull(value, NULL, 10);
        it->aws_chunked = true;
    } else if (!strcasecmp(name, "transfer-encoding")) it->chunked = !!strcasestr(value, "chunked");
    else if (!strcasecmp(name, "expect")) it->expects = true;
    else if (!strcasecmp(name, "connection")) it->closes = !strcasecmp(value, "close");
    else if (!strcasecmp(name, "range")) copied(it->range, sizeof it->range, value);
    else if (!strcasecmp(name, "if-none-match")) it->if_none_match = true;
    else if (!strcasecmp(name, "if-match")) copied(it->if_match, sizeof it->if_match, value);
    else if (!strcasecmp(name, "x-amz-checksum-mode")) it->checksums = true;
    else if (!strcasecmp(name, "x-amz-checksum-crc64nvme")) copied(it->crc, sizeof it->crc, value);
    else if (!strncasecmp(name, "x-amz-meta-", 11)) {
        size_t used = strlen(it->meta);
        snprintf(it->meta + used, sizeof it->meta - used, "%s: %s\r\n", name, value);
    }
}

/* Read a request's head; false when the peer has gone. */
static bool take_head(peer *it, request *ask) {
    char *end;
    memset(ask, 0, sizeof *ask);
    memmove(it->buffer, it->buffer + it->at, it->end - it->at);
    it->end -= it->at, it->at = 0;
    for (;;) {
        it->buffer[it->end] = 0;
        if ((end = strstr(it->buffer, "\r\n\r\n"))) break;
        if (it->end == HEAD) return false;
        ssize_t got = receive(it, it->buffer + it->end, HEAD - it->end);
        if (got <= 0) return false;
        it->end += (size_t)got;
    }
    *end = 0;
    it->at = (size_t)(end - it->buffer) + 4;
    char *rest, *line = strtok_r(it->buffer, "\r\n", &rest);
    if (!line || sscanf(line, "%7s %4095s", ask->method, ask->target) != 2) return false;
    while ((line = strtok_r(NULL, "\r\n", &rest))) {
        char *value = strchr(line, ':');
        if (!value) continue;
        *value++ = 0;
        header(ask, line, value + strspn(value, " "));
    }
    char *query = strchr(ask->target, '?');
    if (query) *query = 0, copied(ask->query, sizeof ask->query, query + 1);
    char *path = ask->target + strspn(ask->target, "/"), *slash = strchr(path, '/');
    copied(ask->key, sizeof ask->key, slash ? slash + 1 : ""); /* after the bucket's name */
    unescape(ask->key);
    return true;
}

/* Take chunks to their end: into `to` as far as there is room, else away. Return how much it was. */
static uint64_t take_chunks(peer *it, request *ask, char *to, uint64_t room) {
    char line[256];
    uint64_t total = 0;
    for (;;) {
        take_line(it, line, sizeof line);
        uint64_t chunk = strtoull(line, NULL, 16);
        if (it->broken || !chunk) break;
        take(it, to && total + chunk <= room ? to + total : NULL, chunk);
        take_line(it, line, sizeof line);
        total += chunk;
    }
    do { /* the trailer may tell the checksum */
        take_line(it, line, sizeof line);
        if (!strncasecmp(line, "x-amz-checksum-crc64nvme:", 25))
            copied(ask->crc, sizeof ask->crc, line + 25 + strspn(line + 25, " "));
    } while (!it->broken && *line);
    return total;
}

/* A manifest: to be kept, however long its history has grown. */
static bool is_document(const char *key) {
    size_t length = strlen(key);
    return length > 5 && !strcmp(key + length - 5, ".json");
}

/* Read the body: keep a small one, throw a large one away. AWS's chunks may lie in those of HTTP. */
static void take_body(peer *it, request *ask) {
    if (ask->expects) give(it, "HTTP/1.1 100 Continue\r\n\r\n", 25);
    uint64_t size = ask->aws_chunked ? ask->decoded : ask->length;
    bool small = (size <= SMALL || is_document(ask->key)) && (ask->aws_chunked || !ask->chunked);
    if (small) ask->body = calloc(1, size + 1);
    if (ask->chunked && ask->aws_chunked) {
        uint64_t room = small ? size + 4096 : 0;
        char *raw = small ? malloc(room) : NULL;
        uint64_t got = take_chunks(it, ask, raw, room);
        for (uint64_t done = 0, at = 0; small && at < got && got <= room;) { /* size CR LF data CR LF */
            char *end = memchr(raw + at, '\n', got - at);
            uint64_t chunk = strtoull(raw + at, NULL, 16);
            if (!end || !chunk || done + chunk > size) break;
            memcpy(ask->body + done, end + 1, chunk);
            done += chunk, at = (uint64_t)(end + 1 - raw) + chunk + 2;
        }
        free(raw);
    } else if (ask->chunked || ask->aws_chunked) {
        ask->decoded = take_chunks(it, ask, ask->body, size);
    } else {
        take(it, ask->body, ask->length);
        ask->decoded = ask->length;
    }
    came += ask->decoded;
    if (small) ask->sum = crc_of(ask->body, ask->decoded);
}

/* --- an answer ----------------------------------------------------------------------------------------- */

typedef struct {
    char *text;
    size_t size, room;
} text;

static void add(text *to, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void add(text *to, const char *format, ...) {
    va_list given;
    for (;;) {
        va_start(given, format);
        int size = vsnprintf(to->text + to->size, to->room - to->size, format, given);
        va_end(given);
        if (to->size + (size_t)size < to->room) {
            to->size += (size_t)size;
            return;
        }
        to->room = to->room * 2 + (size_t)size + 256;
        to->text = realloc(to->text, to->room);
    }
}

static void add_escaped(text *to, const char *raw) {
    for (; *raw; raw++) {
        if (*raw == '&') add(to, "&amp;");
        else if (*raw == '<') add(to, "&lt;");
        else if (*raw == '>') add(to, "&gt;");
        else add(to, "%c", *raw);
    }
}

static void answer(peer *it, const char *status, const char *headers, const char *body, size_t size) {
    text head = {0};
    add(&head, "HTTP/1.1 %s\r\nServer: bench\r\nx-amz-request-id: 1\r\n%sContent-Length: %zu\r\n\r\n", status,
        headers, size);
    if (size && size < CHUNK) { /* in one segment */
        head.text = realloc(head.text, head.size + size);
        memcpy(head.text + head.size, body, size);
        head.size += size, size = 0;
    }
    give(it, head.text, head.size);
    if (size) give(it, body, size);
    free(head.text);
}

static void refuse(peer *it, const request *ask, const char *status, const char *code) {
    char body[256];
    snprintf(body, sizeof body, "<?xml version=\"1.0\"?><Error><Code>%s</Code><Message>%s</Message></Error>", code,
             code);
    size_t size = strcmp(ask->method, "HEAD") ? strlen(body) : 0;
    answer(it, status, "Content-Type: application/xml\r\n", body, size);
}

static void answer_xml(peer *it, text *xml) {
    answer(it, "200 OK", "Content-Type: application/xml\r\n", xml->text, xml->size);
    free(xml->text);
}

/* --- what is asked ------------------------------------------------------------------------------------- */

/* Does the condition hold? Else it is answered. The store is locked. */
static bool holds(peer *it, const request *ask, const object *there) {
    if (ask->if_none_match && there) {
        refuse(it, ask, "412 Precondition Failed", "PreconditionFailed");
        return false;
    }
    if (*ask->if_match && !there) {
        refuse(it, ask, "404 Not Found", "NoSuchKey");
        return false;
    }
    if (*ask->if_match && !strstr(ask->if_match, there->etag)) {
        refuse(it, ask, "412 Precondition Failed", "PreconditionFailed");
        return false;
    }
    return true;
}

/* Does what came agree with its checksum? Of large bodies nobody looks. */
static bool agrees(peer *it, const request *ask, uint64_t *crc, bool *has_crc) {
    *has_crc = crc_read(ask->crc, crc);
    if (ask->body && *has_crc && *crc != ask->sum) {
        refuse(it, ask, "400 Bad Request", "BadDigest");
        return false;
    }
    if (ask->body) *crc = ask->sum, *has_crc = true;
    return true;
}

static void set_etag(object *made) {
    unsigned char md5[EVP_MAX_MD_SIZE];
    unsigned size = 0;
    if (made->body && EVP_Digest(made->body, made->size, md5, &size, EVP_md5(), NULL) == 1)
        for (unsigned n = 0; n < size; n++) sprintf(made->etag + 2 * n, "%02x", md5[n]);
    else sprintf(made->etag, "%032lx-1", ++serial); /* as of parts: no MD5 */
}

static object *put(const char *key, uint64_t size, char *body, const char *meta) {
    object **at = find(key);
    if (*at) drop(at);
    object *made = calloc(1, sizeof *made);
    made->key = strdup(key);
    made->size = size;
    made->body = body;
    made->meta = strdup(meta);
    made->at = time(NULL);
    set_etag(made);
    at = &objects[hash(key)];
    made->next = *at, *at = made;
    return made;
}

static void put_object(peer *it, request *ask) {
    uint64_t crc;
    bool has_crc;
    char headers[256], sum[16];
    if (!agrees(it, ask, &crc, &has_crc) || !holds(it, ask, *find(ask->key))) return;
    object *made = put(ask->key, ask->decoded, ask->body, ask->meta);
    ask->body = NULL;
    made->crc = crc, made->has_crc = has_crc;
    size_t used = (size_t)snprintf(headers, sizeof headers, "ETag: \"%s\"\r\n", made->etag);
    if (has_crc) {
        crc_text(crc, sum);
        snprintf(headers + used, sizeof headers - used,
                 "x-amz-checksum-crc64nvme: %s\r\nx-amz-checksum-type: FULL_OBJECT\r\n", sum);
    }
    answer(it, "200 OK", headers, "", 0);
}

static void create(peer *it, const request *ask) {
    upload *made = calloc(1, sizeof *made);
    made->key = strdup(ask->key);
    made->meta = strdup(ask->meta);
    snprintf(made->id, sizeof made->id, "u%lu", ++serial);
    made->next = uploads, uploads = made;
    text xml = {0};
    add(&xml, "<InitiateMultipartUploadResult><Bucket>b</Bucket><Key>");
    add_escaped(&xml, made->key);
    add(&xml, "</Key><UploadId>%s</UploadId></InitiateMultipartUploadResult>", made->id);
    answer_xml(it, &xml);
}

static void put_part(peer *it, request *ask, upload *to, int number) {
    uint64_t crc;
    bool has_crc;
    char headers[256], sum[16];
    if (!agrees(it, ask, &crc, &has_crc)) return;
    if (number < 1 || number >= PARTS) {
        refuse(it, ask, "400 Bad Request", "InvalidArgument");
        return;
    }
    to->parts[number] = (part){ask->decoded, crc, true, has_crc};
    size_t used = (size_t)snprintf(headers, sizeof headers, "ETag: \"%032x\"\r\n", (unsigned)number);
    if (has_crc) {
        crc_text(crc, sum);
        snprintf(headers + used, sizeof headers - used, "x-amz-checksum-crc64nvme: %s\r\n", sum);
    }
    answer(it, "200 OK", headers, "", 0);
}

static void complete(peer *it, request *ask, upload **at) {
    if (!holds(it, ask, *find(ask->key))) return;
    upload *from = *at;
    uint64_t size = 0, crc = 0;
    bool has_crc = true, any = false;
    for (int n = 1; n < PARTS; n++) {
        const part *each = &from->parts[n];
        if (!each->there) continue;
        has_crc &= each->has_crc;
        crc = any ? crc_joined(crc, each->crc, each->size) : each->crc;
        size += each->size, any = true;
    }
    object *made = put(from->key, size, NULL, from->meta);
    made->crc = crc, made->has_crc = has_crc && any;
    if (size <= SMALL) { /* only the probe makes so small a one; its bytes are never read */
        made->body = calloc(1, size + 1);
    }
    drop_upload(at);
    text xml = {0};
    char sum[16];
    add(&xml, "<?xml version=\"1.0\"?><CompleteMultipartUploadResult><Bucket>b</Bucket><Key>");
    add_escaped(&xml, made->key);
    add(&xml, "</Key><ETag>&quot;%s&quot;</ETag>", made->etag);
    if (made->has_crc) {
        crc_text(crc, sum);
        add(&xml, "<ChecksumCRC64NVME>%s</ChecksumCRC64NVME><ChecksumType>FULL_OBJECT</ChecksumType>", sum);
    }
    add(&xml, "</CompleteMultipartUploadResult>");
    answer_xml(it, &xml);
}

static void list_parts(peer *it, const upload *from) {
    text xml = {0};
    char sum[16];
    add(&xml, "<ListPartsResult><UploadId>%s</UploadId><IsTruncated>false</IsTruncated>", from->id);
    for (int n = 1; n < PARTS; n++) {
        if (!from->parts[n].there) continue;
        add(&xml, "<Part><PartNumber>%d</PartNumber><ETag>&quot;%032x&quot;</ETag><Size>%lu</Size>", n, (unsigned)n,
            from->parts[n].size);
        if (from->parts[n].has_crc) {
            crc_text(from->parts[n].crc, sum);
            add(&xml, "<ChecksumCRC64NVME>%s</ChecksumCRC64NVME>", sum);
        }
        add(&xml, "</Part>");
    }
    add(&xml, "</ListPartsResult>");
    answer_xml(it, &xml);
}

static void list_uploads(peer *it, const request *ask) {
    text xml = {0};
    char prefix[2048] = "";
    asked(ask, "prefix", prefix, sizeof prefix);
    add(&xml, "<ListMultipartUploadsResult><IsTruncated>false</IsTruncated>");
    for (const upload *each = uploads; each; each = each->next) {
        if (strncmp(each->key, prefix, strlen(prefix))) continue;
        add(&xml, "<Upload><Key>");
        add_escaped(&xml, each->key);
        add(&xml, "</Key><UploadId>%s</UploadId></Upload>", each->id);
    }
    add(&xml, "</ListMultipartUploadsResult>");
    answer_xml(it, &xml);
}

static int by_key(const void *a, const void *b) {
    return strcmp((*(object *const *)a)->key, (*(object *const *)b)->key);
}

static void list_objects(peer *it, const request *ask) {
    char prefix[2048] = "", delimiter[8] = "", after[2048] = "", common[2048] = "", date[64];
    asked(ask, "prefix", prefix, sizeof prefix);
    asked(ask, "delimiter", delimiter, sizeof delimiter);
    if (!asked(ask, "continuation-token", after, sizeof after) && !asked(ask, "start-after", after, sizeof after))
        asked(ask, "marker", after, sizeof after);
    size_t found = 0, room = 0, told = 0, length = strlen(prefix);
    object **all = NULL;
    for (int n = 0; n < BUCKETS; n++)
        for (object *each = objects[n]; each; each = each->next) {
            if (strncmp(each->key, prefix, length) || strcmp(each->key, after) <= 0) continue;
            if (found == room) all = realloc(all, (room = room * 2 + 64) * sizeof *all);
            all[found++] = each;
        }
    if (found) qsort(all, found, sizeof *all, by_key);
    text xml = {0}, keys = {0};
    const char *last = "";
    for (size_t n = 0; n < found && told < PAGE; n++) {
        const object *each = all[n];
        const char *cut = *delimiter ? strstr(each->key + length, delimiter) : NULL;
        last = each->key;
        if (cut) {
            size_t size = (size_t)(cut - each->key) + strlen(delimiter);
            if (!strncmp(common, each->key, size) && !common[size]) continue;
            snprintf(common, sizeof common, "%.*s", (int)size, each->key);
            add(&keys, "<CommonPrefixes><Prefix>");
            add_escaped(&keys, common);
            add(&keys, "</Prefix></CommonPrefixes>");
        } else {
            strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S.000Z", gmtime(&each->at));
            add(&keys, "<Contents><Key>");
            add_escaped(&keys, each->key);
            add(&keys, "</Key><LastModified>%s</LastModified><ETag>&quot;%s&quot;</ETag><Size>%lu</Size>", date,
                each->etag, each->size);
            add(&keys, "<StorageClass>STANDARD</StorageClass></Contents>");
        }
        told++;
    }
    bool more = told == PAGE && found && strcmp(last, all[found - 1]->key);
    add(&xml, "<?xml version=\"1.0\"?><ListBucketResult><Name>b</Name><Prefix>");
    add_escaped(&xml, prefix);
    add(&xml, "</Prefix><KeyCount>%zu</KeyCount><MaxKeys>%d</MaxKeys><IsTruncated>%s</IsTruncated>", told, PAGE,
        more ? "true" : "false");
    if (more) {
        add(&xml, "<NextContinuationToken>");
        add_escaped(&xml, last);
        add(&xml, "</NextContinuationToken>");
    }
    add(&xml, "%s</ListBucketResult>", keys.text ? keys.text : "");
    free(keys.text);
    free(all);
    answer_xml(it, &xml);
}

static void about(const request *ask, const object *there, text *headers) {
    char date[64], sum[16];
    strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S GMT", gmtime(&there->at));
    add(headers, "ETag: \"%s\"\r\nLast-Modified: %s\r\nAccept-Ranges: bytes\r\n%s", there->etag, date, there->meta);
    if (ask->checksums && there->has_crc) {
        crc_text(there->crc, sum);
        add(headers, "x-amz-checksum-crc64nvme: %s\r\nx-amz-checksum-type: FULL_OBJECT\r\n", sum);
    }
}

/* Answer a GET; the lock is given back before the bytes go. */
static void get_object(peer *it, const request *ask, const object *there) {
    uint64_t from = 0, to = there->size ? there->size - 1 : 0, first, last;
    text head = {0};
    int given = sscanf(ask->range, "bytes=%lu-%lu", &first, &last);
    if (given == 2 && last < to) to = last;
    if (given >= 1 && first <= to) from = first;
    uint64_t size = there->size ? to - from + 1 : 0;
    if (given >= 1 && first >= there->size) {
        refuse(it, ask, "416 Range Not Satisfiable", "InvalidRange");
        pthread_mutex_unlock(&store);
        return;
    }
    add(&head, "HTTP/1.1 %s\r\nServer: bench\r\nContent-Length: %lu\r\n", given >= 1 ? "206 Partial Content" : "200 OK",
        size);
    if (given >= 1) add(&head, "Content-Range: bytes %lu-%lu/%lu\r\n", from, to, there->size);
    about(ask, there, &head);
    add(&head, "\r\n");
    char *body = there->body ? malloc(size + 1) : NULL;
    if (body) memcpy(body, there->body + from, size);
    bool short_of = !body && from + size > content_size;
    pthread_mutex_unlock(&store);
    give(it, head.text, head.size);
    free(head.text);
    if (short_of) it->broken = true; /* it was never the content that was uploaded */
    if (body) give(it, body, size);
    else if (!short_of) give_content(it, (off_t)from, size);
    free(body);
    went += size;
}

static void head_object(peer *it, const request *ask, const object *there) {
    text head = {0};
    add(&head, "HTTP/1.1 200 OK\r\nServer: bench\r\nContent-Length: %lu\r\n", there->size);
    about(ask, there, &head);
    add(&head, "\r\n");
    give(it, head.text, head.size);
    free(head.text);
}

static void tell_counts(peer *it) {
    text json = {0};
    add(&json, "{\"came\": %llu, \"went\": %llu", came, went);
    for (int n = 0; NAMES[n]; n++) add(&json, ", \"%s\": %llu", NAMES[n], counts[n]);
    add(&json, "}\n");
    answer(it, "200 OK", "Content-Type: application/json\r\n", json.text, json.size);
    free(json.text);
}

/* Say what is asked. */
static int operation(const request *ask) {
    bool upload_id = asked(ask, "uploadId", NULL, 0), begins = asked(ask, "uploads", NULL, 0);
    if (!strcmp(ask->method, "PUT")) return upload_id ? PART : *ask->key ? PUT : OTHER;
    if (!strcmp(ask->method, "POST")) return upload_id ? COMPLETE : begins ? CREATE : OTHER;
    if (!strcmp(ask->method, "DELETE")) return upload_id ? ABORT : DELETED;
    if (!strcmp(ask->method, "HEAD")) return *ask->key ? HEADED : OTHER;
    if (*ask->key) return upload_id ? LIST_PARTS : GET;
    if (begins) return LIST_UPLOADS;
    const char *others[] = {"location", "versioning", "policy", "acl", "object-lock", "encryption", "tagging"};
    for (size_t n = 0; n < sizeof others / sizeof *others; n++)
        if (asked(ask, others[n], NULL, 0)) return OTHER;
    return LIST;
}

static void serve_one(peer *it, request *ask) {
    char id[64] = "", number[16] = "";
    if (!strcmp(ask->target, "/-/counts")) {
        tell_counts(it);
        return;
    }
    int what = operation(ask);
    counts[what]++;
    asked(ask, "uploadId", id, sizeof id);
    asked(ask, "partNumber", number, sizeof number);
    pthread_mutex_lock(&store);
    object **at = find(ask->key);
    upload **to = find_upload(id);
    bool of_upload = what == PART || what == COMPLETE || what == ABORT || what == LIST_PARTS;
    bool of_object = what == GET || what == HEADED;
    if (of_upload && !*to) refuse(it, ask, "404 Not Found", "NoSuchUpload");
    else if (of_object && !*at) refuse(it, ask, "404 Not Found", "NoSuchKey");
    else if (what == GET || what == HEADED || what == DELETED) {
        if (!holds(it, ask, *at)) {
            /* answered */
        } else if (what == GET) {
            get_object(it, ask, *at);
            return;
        } else if (what == HEADED) {
            head_object(it, ask, *at);
        } else {
            if (*at) drop(at);
            answer(it, "204 No Content", "", "", 0);
        }
    } else if (what == PUT) put_object(it, ask);
    else if (what == CREATE) create(it, ask);
    else if (what == PART) put_part(it, ask, *to, atoi(number));
    else if (what == COMPLETE) complete(it, ask, to);
    else if (what == ABORT) {
        drop_upload(to);
        answer(it, "204 No Content", "", "", 0);
    } else if (what == LIST_PARTS) list_parts(it, *to);
    else if (what == LIST_UPLOADS) list_uploads(it, ask);
    else if (what == LIST) list_objects(it, ask);
    else if (asked(ask, "location", NULL, 0))
        answer(it, "200 OK", "", "<LocationConstraint>us-east-1</LocationConstraint>", 50);
    else answer(it, "200 OK", "", "", 0);
    pthread_mutex_unlock(&store);
}

static void *serve(void *given) {
    peer *it = given;
    request *ask = malloc(sizeof *ask);
    if (tls) {
        it->ssl = SSL_new(tls);
        SSL_set_fd(it->ssl, it->fd);
        it->broken = SSL_accept(it->ssl) != 1;
    }
    while (!it->broken && take_head(it, ask)) {
        take_body(it, ask);
        if (!it->broken) serve_one(it, ask);
        free(ask->body);
        if (ask->closes) break;
    }
    if (it->ssl) SSL_free(it->ssl);
    close(it->fd);
    free(ask);
    free(it);
    return NULL;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

int main(int count, char **words) {
    if (count > 2 && !strcmp(words[1], "-l")) {
        link_rate = atof(words[2]) * (1 << 20);
        count -= 2, words += 2;
    }
    if (count != 3 && count != 5) {
        fprintf(stderr, "usage: server [-l MIB] PORT CONTENT [CERTIFICATE KEY]\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    crc_init();
    if ((content = open(words[2], O_RDONLY)) < 0) fail(words[2]);
    struct stat status;
    fstat(content, &status);
    content_size = (uint64_t)status.st_size;
    content_bytes = content_size ? mmap(NULL, content_size, PROT_READ, MAP_SHARED, content, 0) : "";
    if (content_bytes == MAP_FAILED) fail("mmap");
    if (count == 5) {
        tls = SSL_CTX_new(TLS_server_method());
        if (SSL_CTX_use_certificate_chain_file(tls, words[3]) != 1 ||
            SSL_CTX_use_PrivateKey_file(tls, words[4], SSL_FILETYPE_PEM) != 1) {
            fprintf(stderr, "%s, %s: no certificate and key\n", words[3], words[4]);
            return 1;
        }
    }
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(words[1]))};
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    int window = 1 << 20; /* bytes that wait in the kernel are not carried yet */
    if (link_rate) setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &window, sizeof window);
    if (bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 512)) fail(words[1]);
    socklen_t size = sizeof here;
    getsockname(listener, (struct sockaddr *)&here, &size);
    printf("%d\n", ntohs(here.sin_port)); /* it is ready */
    fflush(stdout);
    for (;;) {
        peer *it = calloc(1, sizeof *it);
        if ((it->fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) < 0) {
            free(it);
            continue;
        }
        setsockopt(it->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve, it)) fail("pthread_create");
        pthread_detach(thread);
    }
}
