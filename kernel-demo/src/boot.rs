//! The way from QEMU's entry to Rust, and to the kernel's program.
//!
//! QEMU loads the ELF file and jumps to the address in its Xen note, by the PVH protocol: in 32-bit protected mode,
//! without paging, with the physical address of the start info in EBX. The assembly here only switches to long mode.
//!
//! # References
//!
//! Xen, "x86/HVM direct boot ABI"; QEMU 7.2, `hw/i386/x86.c`, which requires that the note is aligned to 4.

#![expect(unsafe_code, reason = "the boot code and the program are linked by symbol name")]

use core::arch::global_asm;

use crate::start;

/// The page directories that map the first 4 GiB to themselves in 2 MiB pages: present, writable, supervisor.
#[repr(C, align(4096))]
struct IdentityMap([[u64; 512]; 4]);

#[unsafe(no_mangle)]
static mut BOOT_IDENTITY_MAP: IdentityMap = IdentityMap(identity_map());

const fn identity_map() -> [[u64; 512]; 4] {
    const PRESENT_WRITABLE_LARGE: u64 = 0x83;
    let mut map = [[0; 512]; 4];
    let mut index = 0;
    while index < 2048 {
        map[index / 512][index % 512] = (index as u64) << 21 | PRESENT_WRITABLE_LARGE;
        index += 1;
    }
    map
}

/// A null, a 64-bit code and a data descriptor. `segments` replaces this table.
#[unsafe(no_mangle)]
static BOOT_GDT: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

const STACK: usize = 64 * 1024;

#[repr(C, align(4096))]
struct Stack([u8; STACK]);

#[unsafe(no_mangle)]
static mut BOOT_STACK: Stack = Stack([0; STACK]);

global_asm!(
    // The note: size of name, size of description, type XEN_ELFNOTE_PHYS32_ENTRY, name, entry point.
    ".pushsection .note.pvh, \"a\", @note",
    ".balign 4",
    ".long 4, 4, 18",
    ".asciz \"Xen\"",
    ".long pvh_start",
    ".popsection",
    // The two upper levels. They allow everything, so that the leaves decide.
    ".pushsection .data.boot_tables, \"aw\"",
    ".balign 4096",
    "boot_level_4: .quad boot_level_3 + 7",
    ".fill 511, 8, 0",
    "boot_level_3: .quad BOOT_IDENTITY_MAP + 7, BOOT_IDENTITY_MAP + 0x1007, BOOT_IDENTITY_MAP + 0x2007, BOOT_IDENTITY_MAP + 0x3007",
    ".fill 508, 8, 0",
    "boot_gdt_pointer: .word 23",
    ".long BOOT_GDT",
    ".popsection",
    ".pushsection .text.boot, \"ax\"",
    ".code32",
    ".globl pvh_start",
    "pvh_start:",
    "cli",
    "cld",
    "lea esp, [BOOT_STACK + {stack}]",
    "mov edi, ebx",
    // CR4: PAE, OSFXSR, OSXMMEXCPT.
    "mov eax, cr4",
    "or eax, 0x620",
    "mov cr4, eax",
    "lea eax, [boot_level_4]",
    "mov cr3, eax",
    // EFER: LME, NXE.
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x900",
    "wrmsr",
    // CR0: PG, WP, NE, MP, PE; not EM, not TS.
    "mov eax, cr0",
    "and eax, ~0xc",
    "or eax, 0x80010023",
    "mov cr0, eax",
    "lgdt [boot_gdt_pointer]",
    "push 8",
    "lea eax, [2f]",
    "push eax",
    "retf",
    ".code64",
    "2:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "xor ebp, ebp",
    "lea rsp, [rip + BOOT_STACK + {stack}]",
    // A call leaves the stack aligned as the System V ABI requires at a function's first instruction.
    "call {start}",
    "ud2",
    ".popsection",
    stack = const STACK,
    start = sym enter,
);

// SAFETY: `program!` defines the symbol as a function with this signature.
unsafe extern "Rust" {
    /// The program that [`program!`](crate::program) defines.
    safe fn kernel_program();
}

/// Defines the kernel's program: `program!(function)`. The function takes and returns nothing, and runs once.
#[macro_export]
macro_rules! program {
    ($function:path) => {
        #[unsafe(no_mangle)]
        fn kernel_program() {
            $function();
        }
    };
}

extern "C" fn enter(start_info: u64) -> ! {
    // The switch from 32-bit mode leaves the upper half of RDI undefined.
    start::run(start_info & 0xffff_ffff, kernel_program)
}
