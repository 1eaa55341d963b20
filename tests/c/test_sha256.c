#include <string.h>

#include "check.h"
#include "rf/sha256.h"

static void expect(const char *text, size_t repeats, size_t piece, const char *hex) {
    rf_sha256 hash;
    uint8_t digest[32];
    char found[65];
    rf_sha256_init(&hash);
    for (size_t i = 0; i < repeats; i++) {
        const size_t size = strlen(text);
        for (size_t begin = 0; begin < size; begin += piece) {
            rf_sha256_update(&hash, text + begin, size - begin < piece ? size - begin : piece);
        }
    }
    rf_sha256_finish(&hash, digest);
    for (int i = 0; i < 32; i++) {
        found[2 * i] = "0123456789abcdef"[digest[i] >> 4];
        found[2 * i + 1] = "0123456789abcdef"[digest[i] & 15];
    }
    found[64] = '\0';
    CHECK(strcmp(found, hex) == 0);
}

/* The examples of FIPS 180 and of NIST's validation programme. */
int main(void) {
    for (size_t piece = 1; piece <= 64; piece += 7) {
        expect("", 1, piece, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        expect("abc", 1, piece, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        expect("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 1, piece,
               "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    }
    expect("aaaaaaaaaa", 100000, 10,
           "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    return 0;
}
