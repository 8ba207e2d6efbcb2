//! Tells the crate whether a sanitizer instruments it.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(instrumented)");
    // `cfg(sanitize)` itself is unstable.
    let sanitizers = std::env::var("CARGO_CFG_SANITIZE").unwrap_or_default();
    if sanitizers.split(',').any(|name| ["address", "memory", "thread"].contains(&name)) {
        println!("cargo::rustc-cfg=instrumented");
    }
}
