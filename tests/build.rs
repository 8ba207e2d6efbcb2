//! Compiles the C code that the suites run in domains.

fn main() {
    println!("cargo::rerun-if-changed=c");
    cc::Build::new()
        .file("c/helper.c")
        .flag("-fstack-protector-all")
        .flag("-fexceptions")
        .define("_FORTIFY_SOURCE", "2")
        .opt_level(1)
        .warnings_into_errors(true)
        .flag("-Wno-infinite-recursion")
        .cargo_metadata(false)
        .compile("helper");
    let folder = std::env::var("OUT_DIR").expect("cargo sets it");
    println!("cargo::rustc-link-arg-tests=-L{folder}");
    println!("cargo::rustc-link-arg-tests=-l:libhelper.a");
    with_sanitizer(&folder);
}

/// Compiles C code under AddressSanitizer, if the compiler has GCC's runtime for it.
fn with_sanitizer(folder: &str) {
    println!("cargo::rustc-check-cfg=cfg(has_libasan)");
    let mut build = cc::Build::new();
    let find = build.get_compiler().to_command().arg("-print-file-name=libasan.so").output();
    // A compiler that does not find the file prints its name alone.
    if !find.is_ok_and(|found| found.stdout.starts_with(b"/")) {
        return;
    }
    build.file("c/sanitized.c").flag("-fsanitize=address").opt_level(1).warnings_into_errors(true);
    build.cargo_metadata(false).compile("sanitized");
    println!("cargo::rustc-link-search=native={folder}");
    println!("cargo::rustc-cfg=has_libasan");
}
