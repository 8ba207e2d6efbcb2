//! Checks that the compiler says what `docs/when-it-does-not-compile.md` says that it does.
//!
//! The documentation tests show that the examples fail, and that what is to be written instead compiles.

use std::fs;
use std::process::Command;

use crate::build::workspace;

/// An example that does not compile, and the text that the compiler's message contains.
struct Example {
    code: String,
    message: String,
}

/// Returns the examples in a document: each is followed by its message.
fn examples(document: &str) -> Vec<Example> {
    let block = |after: &str| after.split_once("\n```").map(|(block, _)| block.trim_start_matches('\n').to_owned());
    let examples = document.split("```rust,compile_fail").skip(1);
    let example = |text: &str| Some(Example { code: block(text)?, message: block(text.split_once("```text")?.1)? });
    examples.filter_map(example).collect()
}

/// Compiles programs in a package of their own, and returns what the compiler says about each.
fn compile(programs: &[String]) -> Vec<String> {
    let folder = workspace().join("target/messages");
    let sources = folder.join("src/bin");
    fs::create_dir_all(&sources).unwrap();
    let userspace = workspace().join("userspace");
    let manifest = format!(
        "[package]\nname = \"messages\"\nedition = \"2024\"\n\n[dependencies]\npkru-userspace = {{ path = {userspace:?} }}\n\n\
         [workspace]\n"
    );
    fs::write(folder.join("Cargo.toml"), manifest).unwrap();
    fs::copy(workspace().join("Cargo.lock"), folder.join("Cargo.lock")).unwrap();
    let name = |number: usize| format!("example_{number}");
    for (number, program) in programs.iter().enumerate() {
        fs::write(sources.join(name(number)).with_extension("rs"), program).unwrap();
    }
    let build = |number| {
        let mut command = Command::new("cargo");
        command.args(["build", "--offline", "--color", "never", "--bin", &name(number)]).current_dir(&folder);
        // Cargo has set some of these for this test.
        command.env("CARGO_TARGET_DIR", folder.join("target")).env_remove("RUSTFLAGS");
        let output = command.output().unwrap();
        assert!(!output.status.success(), "this compiles:\n{}", programs[number]);
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    (0..programs.len()).map(build).collect()
}

#[test]
fn the_compiler_says_what_the_document_says() {
    let document = fs::read_to_string(workspace().join("docs/when-it-does-not-compile.md")).unwrap();
    let examples = examples(&document);
    assert!(examples.len() >= 10, "only {} found", examples.len());
    let program = |Example { code, .. }: &Example| {
        // The documentation hides what begins so.
        let code: String = code.lines().map(|line| format!("{}\n", line.trim_start_matches("# "))).collect();
        if code.contains("fn main()") { code } else { format!("{code}fn main() {{}}\n") }
    };
    let programs: Vec<_> = examples.iter().map(program).collect();
    for (Example { code, message }, said) in examples.iter().zip(compile(&programs)) {
        assert!(said.contains(message), "expected `{message}` for\n{code}\n\nbut the compiler says\n{said}");
        if message.ends_with("cannot leave a domain") {
            for note in ["in place of a reference", "can cross as text", "when-it-does-not-compile.md"] {
                assert!(said.contains(note), "`{note}` is not in\n{said}");
            }
        }
    }
}
