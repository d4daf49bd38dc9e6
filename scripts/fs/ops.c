/*
 * ops OP THREADS PASSES ROOT LIST
 *
 * Does an operation on the tree at ROOT, PASSES times with THREADS threads. Prints a line for each pass: the seconds
 * that it took, and the amount of work that was done. An amount that differs between two file systems shows that the
 * times cannot be compared.
 *
 * LIST names what is below ROOT. Each of its entries is "TYPE SIZE PATH" and a NUL byte, as find prints them with
 * -printf '%y %s %P\0'. The threads take entries in the order of the list. A small file has at most 16 KiB. The
 * operations are:
 *
 *   walk         read all directories from ROOT down, without the list            amount: entries
 *   stat         lstat every path                                                 amount: paths
 *   small-reads  read every small file                                            amount: bytes
 *   all-reads    read every file                                                  amount: bytes
 *   random-4k    read 4 KiB at random places of the other files, opened before    amount: bytes
 *   mmap         map every other file and touch each of its pages                 amount: pages
 *
 * Any error ends the program with status 1.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    SMALL = 16 << 10,
    BLOCK = 4096,
    BUFFER = 128 << 10, /* What cat and cp read at a time. */
    RANDOM_READS = 16384,
    BATCH = 16, /* Items that a thread takes at a time. They are neighbours in the tree. */
    MAX_THREADS = 64,
};

/* One piece of work. `place` and `fd` are for random-4k only. */
struct item {
    const char *path;
    off_t size, place;
    char type;
    int fd;
};

static int root;
static struct item *items;
static size_t item_count;
static atomic_size_t next_item, done;
static _Thread_local char buffer[BUFFER];

__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char *format, ...)
{
    va_list arguments;

    fputs("ops: ", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    /* Other threads may be in the middle of a system call. _exit does not wait for them. */
    _exit(1);
}

__attribute__((noreturn)) static void fail_at(const char *path, const char *what)
{
    fail("%s: %s: %s", path, what, strerror(errno));
}

static void *allocate(void *old, size_t size)
{
    void *memory = realloc(old, size);

    if (!memory)
        fail("out of memory");
    return memory;
}

static char *copy(const char *text)
{
    return strcpy(allocate(NULL, strlen(text) + 1), text);
}

static int open_item(const struct item *item)
{
    int fd = openat(root, item->path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);

    if (fd < 0)
        fail_at(item->path, "open");
    return fd;
}

static void check_size(const struct item *item, off_t size)
{
    if (size != item->size)
        fail("%s: has %jd bytes, but %jd in the list", item->path, (intmax_t)size, (intmax_t)item->size);
}

/* Operations on one item. They return the amount of work. */

static size_t stat_item(const struct item *item)
{
    struct stat status;

    if (fstatat(root, item->path, &status, AT_SYMLINK_NOFOLLOW))
        fail_at(item->path, "lstat");
    if (item->type == 'f')
        check_size(item, status.st_size);
    return 1;
}

static size_t read_item(const struct item *item)
{
    int fd = open_item(item);
    off_t size = 0;
    ssize_t got;

    while ((got = read(fd, buffer, BUFFER)) > 0)
        size += got;
    if (got < 0)
        fail_at(item->path, "read");
    close(fd);
    check_size(item, size);
    return size;
}

static size_t read_place(const struct item *item)
{
    off_t left = item->size - item->place;
    ssize_t expected = left < BLOCK ? left : BLOCK;
    ssize_t got = pread(item->fd, buffer, BLOCK, item->place);

    if (got < 0)
        fail_at(item->path, "pread");
    if (got != expected)
        fail("%s: %zd of %zd bytes at %jd", item->path, got, expected, (intmax_t)item->place);
    return got;
}

static size_t map_item(const struct item *item)
{
    int fd = open_item(item);
    size_t pages = 0, page = sysconf(_SC_PAGESIZE);
    const volatile char *bytes;
    struct stat status;

    /* A page behind the end of a file cannot be touched. */
    if (fstat(fd, &status))
        fail_at(item->path, "fstat");
    check_size(item, status.st_size);
    bytes = mmap(NULL, item->size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (bytes == MAP_FAILED)
        fail_at(item->path, "mmap");
    close(fd);
    for (off_t place = 0; place < item->size; place += page, pages++)
        (void)bytes[place];
    munmap((void *)bytes, item->size);
    return pages;
}

static int is_any(const struct item *item) { return item->type != '\0'; }
static int is_file(const struct item *item) { return item->type == 'f'; }
static int is_small(const struct item *item) { return is_file(item) && item->size <= SMALL; }
static int is_larger(const struct item *item) { return is_file(item) && item->size > SMALL; }

static const struct op {
    const char *name;
    int (*is_chosen)(const struct item *);
    size_t (*work)(const struct item *);
} ops[] = {
    {"stat", is_any, stat_item},         {"small-reads", is_small, read_item}, {"all-reads", is_file, read_item},
    {"random-4k", is_larger, read_place}, {"mmap", is_larger, map_item},
}, *op;

static void *do_items(void *unused)
{
    size_t amount = 0, first;

    while ((first = atomic_fetch_add(&next_item, BATCH)) < item_count)
        for (size_t i = first; i < item_count && i < first + BATCH; i++)
            amount += op->work(&items[i]);
    atomic_fetch_add(&done, amount);
    return unused;
}

/* The directories that a walk has found and not read yet. The walk ends when there are none, and no thread is reading
 * one. */
static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    char **paths;
    size_t count, room, readers;
} found = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static void add_directory(char *path)
{
    pthread_mutex_lock(&found.lock);
    if (found.count == found.room)
        found.paths = allocate(found.paths, (found.room = 2 * found.room + 64) * sizeof *found.paths);
    found.paths[found.count++] = path;
    pthread_cond_signal(&found.changed);
    pthread_mutex_unlock(&found.lock);
}

static int is_directory(int parent, const struct dirent *entry, const char *path)
{
    struct stat status;

    if (entry->d_type != DT_UNKNOWN)
        return entry->d_type == DT_DIR;
    if (fstatat(parent, entry->d_name, &status, AT_SYMLINK_NOFOLLOW))
        fail_at(path, "lstat");
    return S_ISDIR(status.st_mode);
}

static size_t read_directory(const char *path)
{
    int fd = openat(root, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *directory = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *entry;
    size_t entries = 0;

    if (!directory)
        fail_at(path, "open");
    while (errno = 0, (entry = readdir(directory))) {
        char *below;

        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        entries++;
        if (!is_directory(fd, entry, path))
            continue;
        if (asprintf(&below, "%s/%s", path, entry->d_name) < 0)
            fail("out of memory");
        add_directory(below);
    }
    if (errno)
        fail_at(path, "readdir");
    closedir(directory);
    return entries;
}

static void *walk(void *unused)
{
    pthread_mutex_lock(&found.lock);
    for (;;) {
        while (!found.count && found.readers)
            pthread_cond_wait(&found.changed, &found.lock);
        if (!found.count)
            break;
        char *path = found.paths[--found.count];
        found.readers++;
        pthread_mutex_unlock(&found.lock);
        atomic_fetch_add(&done, read_directory(path));
        free(path);
        pthread_mutex_lock(&found.lock);
        found.readers--;
    }
    /* The other threads look again, and end as well. */
    pthread_cond_broadcast(&found.changed);
    pthread_mutex_unlock(&found.lock);
    return unused;
}

/* Sets `items` to the entries of the list that the operation chooses. */
static void read_list(const char *path)
{
    FILE *list = fopen(path, "r");
    size_t room = 0;
    struct item item = {.fd = -1};
    char *line = NULL, *end;
    size_t line_room = 0;

    if (!list)
        fail_at(path, "open");
    while (errno = 0, getdelim(&line, &line_room, '\0', list) > 0) {
        item.type = line[0];
        item.size = strtoll(line + 1, &end, 10);
        if (end[0] != ' ' || !end[1])
            fail("%s: not an entry: %s", path, line);
        if (!op->is_chosen(&item))
            continue;
        item.path = copy(end + 1);
        if (item_count == room)
            items = allocate(items, (room = 2 * room + 1024) * sizeof *items);
        items[item_count++] = item;
    }
    if (errno || ferror(list))
        fail_at(path, "read");
    free(line);
    fclose(list);
    if (!item_count)
        fail("%s: has no file for %s", path, op->name);
}

/* The generator splitmix64. It starts with a constant, so the places are the same each time. */
static uint64_t random_number(void)
{
    static uint64_t state;
    uint64_t number = state += 0x9e3779b97f4a7c15;

    number = (number ^ number >> 30) * 0xbf58476d1ce4e5b9;
    number = (number ^ number >> 27) * 0x94d049bb133111eb;
    return number ^ number >> 31;
}

/* Replaces the items, which are files, by random places in them. All blocks are equally likely. */
static void choose_places(void)
{
    struct item *places = allocate(NULL, RANDOM_READS * sizeof *places);
    uint64_t *blocks_before = allocate(NULL, (item_count + 1) * sizeof *blocks_before);
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit))
        fail("getrlimit: %s", strerror(errno));
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit))
        fail("setrlimit: %s", strerror(errno));
    blocks_before[0] = 0;
    for (size_t i = 0; i < item_count; i++) {
        items[i].fd = open_item(&items[i]);
        blocks_before[i + 1] = blocks_before[i] + (items[i].size + BLOCK - 1) / BLOCK;
    }
    for (size_t i = 0; i < RANDOM_READS; i++) {
        uint64_t block = random_number() % blocks_before[item_count];
        size_t low = 0, high = item_count;

        /* The file `low` begins at or before the block, the file `high` behind it. */
        while (high - low > 1) {
            size_t middle = (low + high) / 2;

            if (blocks_before[middle] <= block)
                low = middle;
            else
                high = middle;
        }
        places[i] = items[low];
        places[i].place = (off_t)(block - blocks_before[low]) * BLOCK;
    }
    free(blocks_before);
    free(items);
    items = places;
    item_count = RANDOM_READS;
}

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void do_pass(long threads, void *(*thread)(void *))
{
    pthread_t ids[MAX_THREADS];
    double start = now();
    int error;

    atomic_store(&next_item, 0);
    atomic_store(&done, 0);
    for (long i = 0; i < threads; i++)
        if ((error = pthread_create(&ids[i], NULL, thread, NULL)))
            fail("pthread_create: %s", strerror(error));
    for (long i = 0; i < threads; i++)
        pthread_join(ids[i], NULL);
    printf("%.6f %zu\n", now() - start, atomic_load(&done));
}

int main(int argc, char **argv)
{
    long threads = argc == 6 ? atol(argv[2]) : 0, passes = argc == 6 ? atol(argv[3]) : 0;
    int is_walk;

    if (threads < 1 || threads > MAX_THREADS || passes < 1)
        fail("usage: ops OP THREADS PASSES ROOT LIST");
    is_walk = !strcmp(argv[1], "walk");
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++)
        if (!strcmp(argv[1], ops[i].name))
            op = &ops[i];
    if (!op && !is_walk)
        fail("no operation called %s", argv[1]);
    root = open(argv[4], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        fail_at(argv[4], "open");
    if (!is_walk)
        read_list(argv[5]);
    if (!is_walk && op->work == read_place)
        choose_places();
    /* A pass must not wait for pages of this program that are still on the disk. */
    if (mlockall(MCL_CURRENT))
        fail("mlockall: %s", strerror(errno));
    for (; passes; passes--) {
        if (is_walk)
            add_directory(copy("."));
        do_pass(threads, is_walk ? walk : do_items);
    }
    if (fflush(stdout))
        fail("output: %s", strerror(errno));
    return 0;
}
