// as-user UID GID[,GID...] PROGRAM [ARGUMENT...]: runs a program as a user and a member of groups, all given as numbers.
// The first group is the main one. The guest needs this because busybox can only become a user that has an account.
#include <errno.h>
#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define MAX_GROUPS 1024

int main(int argc, char **argv) {
    static gid_t groups[MAX_GROUPS];
    size_t count = 0;
    if (argc < 4) {
        fprintf(stderr, "usage: as-user UID GID[,GID...] PROGRAM [ARGUMENT...]\n");
        return 125;
    }
    for (char *at = argv[2]; count < MAX_GROUPS; at++) {
        groups[count++] = strtoul(at, &at, 10);
        if (*at != ',') break;
    }
    if (setgroups(count, groups) || setgid(groups[0]) || setuid(strtoul(argv[1], NULL, 10))) {
        perror("as-user");
        return 125;
    }
    execvp(argv[3], argv + 3);
    perror(argv[3]);
    return errno == ENOENT ? 127 : 126;
}
