//! The guest's file system: a newc archive of the program, the libraries it loads, and other files.
//!
//! Each file has the same path as on the host, so paths in arguments stay valid.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Cursor, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use cpio::NewcBuilder;
use cpio::newc::trailer;
use object::elf;
use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
use object::{Endianness, Object};

use crate::Error;
use crate::init::{INIT_PATH, TASK_PATH, Task};

/// `S_IFDIR` and `S_IFREG` of stat(2), as newc stores them.
const DIRECTORY: u32 = 0o040_755;
const REGULAR: u32 = 0o100_000;

/// An archive under construction: mode and contents by path. The map's order puts a folder before its contents.
#[derive(Debug)]
pub struct Initramfs {
    entries: BTreeMap<PathBuf, (u32, Vec<u8>)>,
}

impl Initramfs {
    /// Creates an archive with the binary `init` as the first process.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] if `init` or one of its libraries cannot be read.
    pub fn new(init: &Path) -> Result<Self, Error> {
        let mut archive = Self { entries: BTreeMap::new() };
        for directory in ["/dev", "/proc", "/sys", "/tmp", "/root"] {
            archive.add_directory(Path::new(directory));
        }
        archive.add_file(Path::new(INIT_PATH), init)?;
        archive.add_libraries(init)?;
        Ok(archive)
    }

    /// Adds an x86-64 program and every library that `ldd` names for it.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] if the file is missing, is not an ELF for x86-64, or lacks a library.
    pub fn add_program(&mut self, program: &Path) -> Result<(), Error> {
        check_elf(program)?;
        self.add_file(program, program)?;
        self.add_libraries(program)
    }

    /// Adds a file, or a folder and everything in it, at the same path.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] if a file or folder cannot be read.
    pub fn add_tree(&mut self, path: &Path) -> Result<(), Error> {
        if !path.is_dir() {
            self.add_file(path, path)?;
            // The file may be a program that the guest runs.
            return if is_dynamic(path) { self.add_libraries(path) } else { Ok(()) };
        }
        self.add_directory(path);
        for entry in fs::read_dir(path).map_err(|error| Error::input(path, error))? {
            self.add_tree(&entry.map_err(|error| Error::input(path, error))?.path())?;
        }
        Ok(())
    }

    /// Adds the task for [`init`](crate::init).
    pub(crate) fn add_task(&mut self, task: &Task) {
        self.add_directory(&task.directory);
        self.insert(Path::new(TASK_PATH), REGULAR | 0o644, task.to_bytes());
    }

    /// Writes the archive to an empty file.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if writing fails.
    pub fn write(&self, file: &File) -> Result<(), Error> {
        self.try_write(file).map_err(Error::io("write the guest's file system"))
    }

    fn try_write(&self, file: &File) -> std::io::Result<()> {
        let mut output = BufWriter::new(file);
        for (number, (path, (mode, contents))) in self.entries.iter().enumerate() {
            let name = path.to_string_lossy();
            let header = NewcBuilder::new(name.trim_start_matches('/')).ino(number as u32 + 1).mode(*mode);
            let size = u32::try_from(contents.len()).map_err(std::io::Error::other)?;
            let mut entry = header.write(&mut output, size);
            entry.write_all(contents)?;
            entry.finish()?;
        }
        trailer(&mut output)?.flush()
    }

    fn add_file(&mut self, path: &Path, source: &Path) -> Result<(), Error> {
        let contents = fs::read(source).map_err(|error| Error::input(source, error))?;
        let metadata = fs::metadata(source).map_err(|error| Error::input(source, error))?;
        self.insert(path, REGULAR | (metadata.permissions().mode() & 0o7777), contents);
        Ok(())
    }

    fn add_directory(&mut self, path: &Path) {
        self.insert(path, DIRECTORY, Vec::new());
    }

    fn insert(&mut self, path: &Path, mode: u32, contents: Vec<u8>) {
        for folder in path.ancestors().skip(1).filter(|folder| folder.parent().is_some()) {
            self.entries.entry(folder.into()).or_insert((DIRECTORY, Vec::new()));
        }
        if path.parent().is_some() {
            self.entries.insert(path.into(), (mode, contents));
        }
    }

    fn add_libraries(&mut self, program: &Path) -> Result<(), Error> {
        if !is_dynamic(program) {
            return Ok(());
        }
        let output = Command::new("ldd")
            .arg(program)
            .output()
            .map_err(Error::io("run ldd, which lists a program's libraries"))?;
        let listing = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            return Err(Error::input(program, format!("ldd: {}", String::from_utf8_lossy(&output.stderr).trim())));
        }
        for line in listing.lines() {
            match library(line.trim()) {
                Library::At(path) => self.add_file(Path::new(path), Path::new(path))?,
                Library::Missing(name) => {
                    return Err(Error::input(program, format!("needs {name}, which is not found")));
                }
                Library::None => {}
            }
        }
        Ok(())
    }
}

/// One line of ldd's output, parsed.
#[derive(Debug, PartialEq)]
enum Library<'a> {
    At(&'a str),
    Missing(&'a str),
    None,
}

fn library(line: &str) -> Library<'_> {
    let (name, place) = line.split_once(" => ").unwrap_or(("", line));
    match place.split_whitespace().next() {
        Some("not") => Library::Missing(name),
        Some(path) if path.starts_with('/') => Library::At(path),
        _ => Library::None,
    }
}

/// Checks that a file is an ELF for x86-64, the guest's architecture.
pub(crate) fn check_elf(path: &Path) -> Result<(), Error> {
    let data = fs::read(path).map_err(|error| Error::input(path, error))?;
    if !data.starts_with(&elf::ELFMAG) {
        return Err(Error::input(path, "not an ELF binary"));
    }
    match object::File::parse(&*data).map(|file| file.architecture()) {
        Ok(object::Architecture::X86_64) => Ok(()),
        Ok(other) => Err(Error::input(path, format!("built for {other:?}, but the guest is X86_64"))),
        Err(error) => Err(Error::input(path, error)),
    }
}

/// Returns whether the file is an ELF with a dynamic loader.
fn is_dynamic(path: &Path) -> bool {
    let Ok(data) = fs::read(path) else { return false };
    let Ok(file) = ElfFile64::<Endianness>::parse(&*data) else { return false };
    let Ok(headers) = file.elf_header().program_headers(file.endian(), &*data) else { return false };
    headers.iter().any(|header| header.p_type(file.endian()) == elf::PT_INTERP)
}

impl Task {
    /// Encodes the task as NUL-terminated strings: folder, program, number of arguments, arguments, environment.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        let mut put = |string: &[u8]| {
            // Writing to a `Vec` does not fail.
            let _ = bytes.write_all(string);
            let _ = bytes.write_all(&[0]);
        };
        put(self.directory.as_os_str().as_bytes());
        put(self.program.as_os_str().as_bytes());
        put(self.arguments.len().to_string().as_bytes());
        for argument in &self.arguments {
            put(argument.as_bytes());
        }
        for (name, value) in &self.environment {
            put(name.as_bytes());
            put(value.as_bytes());
        }
        bytes.into_inner()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_lines() {
        assert_eq!(library("libpng16.so.16 => /lib/x.so (0x00007f)"), Library::At("/lib/x.so"));
        assert_eq!(library("/lib64/ld-linux-x86-64.so.2 (0x00007f)"), Library::At("/lib64/ld-linux-x86-64.so.2"));
        assert_eq!(library("libnone.so => not found"), Library::Missing("libnone.so"));
        assert_eq!(library("linux-vdso.so.1 (0x00007f)"), Library::None);
        assert_eq!(library(""), Library::None);
    }

    #[test]
    fn folders_come_before_their_files() {
        let mut archive = Initramfs { entries: BTreeMap::new() };
        archive.insert(Path::new("/a/b/c"), REGULAR, vec![1]);
        let paths: Vec<_> = archive.entries.keys().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/a", "/a/b", "/a/b/c"]);
    }

    #[test]
    fn a_script_is_no_program() {
        let error = check_elf(Path::new("/etc/passwd")).unwrap_err();
        assert_eq!(error.to_string(), "/etc/passwd: not an ELF binary");
    }

    #[test]
    fn a_binary_for_another_machine_is_refused() {
        let mut elf = fs::read(std::env::current_exe().unwrap()).unwrap();
        elf[18] = 183; // e_machine: AArch64
        let path = std::env::temp_dir().join(format!("pkru-qemu-test-{}", std::process::id()));
        fs::write(&path, elf).unwrap();
        let error = check_elf(&path).unwrap_err();
        fs::remove_file(&path).unwrap();
        assert!(error.to_string().ends_with("built for Aarch64, but the guest is X86_64"), "{error}");
        assert_eq!(error.status(), 119);
    }
}
