//! Gives the linker the kernel's memory layout when it builds for bare metal.

fn main() {
    println!("cargo:rerun-if-changed=layout.ld");
    let bare = std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "none");
    if bare {
        let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
        for argument in ["--no-pie".into(), format!("-T{here}/layout.ld")] {
            println!("cargo:rustc-link-arg={argument}");
        }
    }
}
