//! Gives the linker the kernel's memory layout. For the host it gives it a `main` instead.

fn main() {
    println!("cargo:rerun-if-changed=layout.ld");
    println!("cargo:rerun-if-changed=host.c");
    let bare = std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "none");
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    if bare {
        println!("cargo:rustc-link-arg=--no-pie");
        println!("cargo:rustc-link-arg=-T{here}/layout.ld");
    } else {
        // The host's linker is a C compiler, so it takes a source file too.
        println!("cargo:rustc-link-arg={here}/host.c");
    }
}
