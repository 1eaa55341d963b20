/* The smallest test harness that names the line. */
#ifndef RF_TESTS_CHECK_H
#define RF_TESTS_CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

/* A validator's verdict: RF_OK without a reason, or a failure whose reason contains a text. */
#define CHECK_VALID(call)                                                                          \
    do {                                                                                           \
        const char *reason = NULL;                                                                 \
        if ((call) != 0 || reason == NULL || *reason) {                                            \
            fprintf(stderr, "%s:%d: invalid: %s\n", __FILE__, __LINE__, reason);                   \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

#define CHECK_INVALID(call, text)                                                                  \
    do {                                                                                           \
        const char *reason = NULL;                                                                 \
        if ((call) == 0 || reason == NULL || !strstr(reason, text)) {                              \
            fprintf(stderr, "%s:%d: expected \"%s\", got \"%s\"\n", __FILE__, __LINE__, text,      \
                    reason);                                                                       \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

#define COUNT(array) (sizeof(array) / sizeof *(array))

#endif
