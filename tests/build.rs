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
}
