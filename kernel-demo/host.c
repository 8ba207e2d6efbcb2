/* The `main` of a build for the host, which compiles no kernel. */

#include <stdio.h>

int main(void) {
    puts("This is a kernel: boot it with `scripts/cargo-none run -p kernel-demo` or `scripts/cargo-none test -p kernel-demo`.");
    return 0;
}
