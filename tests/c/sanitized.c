/* C code under AddressSanitizer, for the suite sanitizers. */

#define _GNU_SOURCE
#include <malloc.h>
#include <stdlib.h>
#include <string.h>

/* The tests of a suite leave memory to the end of their process. */
const char *__asan_default_options(void)
{
    return "detect_leaks=0:exitcode=42";
}

/* Returns the length of a copy that the sanitizer's strdup allocates. */
size_t sanitized_duplicate(const char *text)
{
    char *copy = strdup(text);
    size_t length = strlen(copy);
    free(copy);
    return length;
}

/* Uses the rest of the malloc family. Returns whether each block is as large as it should be. */
int sanitized_family(void)
{
    void *aligned = NULL;
    if (posix_memalign(&aligned, 64, 100) != 0)
        return 0;
    void *cleared = calloc(10, 10);
    void *grown = realloc(strdup("text"), 100);
    int good = malloc_usable_size(aligned) >= 100 && malloc_usable_size(cleared) >= 100 && malloc_usable_size(grown) >= 100;
    free(aligned);
    free(cleared);
    free(grown);
    return good;
}

/* Writes after the end of a block of `size` bytes. */
int sanitized_overflow(size_t size)
{
    volatile char *block = malloc(size);
    block[size] = 1;
    int written = block[size];
    free((void *)block);
    return written;
}
