//! The call gate: the code that enters a domain and leaves it.
//!
//! A round trip writes the rights register, PKRU or PKRS, twice. The way in saves the caller's state, publishes the
//! [`Context`] of the call in a table, and switches rights, FS base and stack. The way out switches them back. If the
//! domain traps, the fault handler ends the call with [`Gate::rewind`] instead.
//!
//! # What the way out trusts
//!
//! The way out trusts the table of running contexts and the contexts. Domains cannot write either. It trusts no
//! register and no stack contents of the domain. It finds the context in these steps:
//!
//! 1. RBX holds an untrusted key number, used only as an index and verified against the rights register. The way in put
//!    the domain's own key there, and the calling convention requires the entry point to preserve it.
//! 2. The low four bits of RBX select one of the 16 entries of the table. The entry of a key without a running call is
//!    null. Reading a context through it faults, because nothing is mapped at address 0.
//! 3. The rights register must agree with that context on key 0 and on the context's own key. Each own key is closed to
//!    all other domains, so the rights of a domain agree with its own context only.
//! 4. If they disagree the gate executes UD2. The domain's rights are still in force, so this trap ends the call like
//!    any other trap in the domain.
//!
//! The gate returns the result in RAX unchecked. The caller must treat it as hostile.
//!
//! # Checks after each write of the rights register
//!
//! Code in the domain can jump to the gate's WRPKRU or WRMSR with a value of its choice in EAX. So after each write the
//! gate trusts no register that was set before. It loads the context from the table again, by the key number in RBX,
//! and compares the value written with the value in the context. The way out also compares the FS base with the
//! caller's, which differs between threads. On a mismatch the gate executes UD2.
//!
//! These checks catch wild jumps. They do not stop code that sets out to escape: it can jump there with the values and
//! the FS base of another running context.
//!
//! # Order
//!
//! The caller's rights are never in force together with the domain's stack or thread-locals. An interrupt or signal can
//! arrive between any two instructions, and its handler can rely on this.
//!
//! - The way in switches the rights first, then FS base and stack pointer.
//! - The way out switches stack pointer and FS base first, then the rights.
//!
//! # Registers
//!
//! | step | R10 | R8 | RDI | RBX | RSI | RAX |
//! |---|---|---|---|---|---|---|
//! | enter | context | entry point | argument | saved | | |
//! | rights switched | context, reloaded from the table | entry point | argument | key | | rights |
//! | in the domain | context | entry point | argument | key | 0 | rights |
//! | back from the entry point | any | any | any | untrusted key number | any | result |
//! | rights switched | context, reloaded from the table | | | key | result | rights |
//! | return | | | | restored | result; RDX: 0 returned, 1 rewound | |
//!
//! The way in clears RBP, R9 and R12 to R15; RDX is 0 too. RCX holds the domain's FS base, and R11 the address of the
//! table. It does not clear the vector registers: the domain can read what the caller left in them.
//!
//! The way out restores RBX, RBP, FS base, GS base, MXCSR and the x87 control word. It clears the flags DF, AC and NT,
//! and empties the x87 stack. It does not restore R12 to R15. [`Gate::enter`] declares them as clobbered and is
//! inlined, so the compiler saves them once, and only where they are in use.
//!
//! # References
//!
//! - System V ABI, AMD64 supplement, section "Registers and the Stack Frame".
//! - Intel SDM volume 2, WRPKRU, WRMSR, WRFSBASE.

use core::arch::{asm, naked_asm};
use core::cell::UnsafeCell;
use core::mem::{offset_of, size_of};
use core::ops::Range;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, Ordering};

use crate::domain::Entry;
use crate::instructions::IA32_PKRS;
use crate::{AccessRights, KeyRights, ProtectionKey};

/// The gate's record of a call: stack, FS base and rights of the domain, and the caller's saved state.
///
/// It lies in memory that domains cannot write.
#[derive(Debug)]
#[repr(C)]
pub struct Context {
    stack: u64,
    fs_base: u64,
    rights: u32,
    /// Invariant: below 16. The gate uses it as an index into [`Active`].
    key: u32,
    /// A mask over `rights`: the bits of key 0 and of the domain's own key. They identify the domain. The other bits
    /// can change during a call: Linux changes PKRU when it makes memory execute-only (Linux 6.12,
    /// `arch/x86/mm/pkeys.c`, `__execute_only_pkey`).
    identity: u32,
    caller: UnsafeCell<Caller>,
}

/// The caller's state, which the way in saves.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Caller {
    stack: u64,
    fs_base: u64,
    gs_base: u64,
    rights: u32,
    mxcsr: u32,
    x87_control: u16,
}

const CALLER: usize = offset_of!(Context, caller);
const CALLER_STACK: usize = CALLER + offset_of!(Caller, stack);
const CALLER_FS_BASE: usize = CALLER + offset_of!(Caller, fs_base);
const CALLER_GS_BASE: usize = CALLER + offset_of!(Caller, gs_base);
const CALLER_RIGHTS: usize = CALLER + offset_of!(Caller, rights);
const CALLER_MXCSR: usize = CALLER + offset_of!(Caller, mxcsr);
const CALLER_X87: usize = CALLER + offset_of!(Caller, x87_control);

impl Context {
    /// Creates the context of a domain with the own key `key`.
    ///
    /// `stack` is the address one past the end of the domain's stack. It is rounded down to a multiple of 16. `fs_base`
    /// is the domain's FS base. `rights` must allow writes under `key`, and must not allow writes under key 0.
    ///
    /// # Panics
    ///
    /// Panics if `rights` does not allow writes under `key`, or allows them under key 0.
    #[must_use]
    pub const fn new(key: ProtectionKey, rights: KeyRights, stack: u64, fs_base: u64) -> Self {
        let mut context = Self::without_key(stack, fs_base);
        context.set_key(key, rights);
        context
    }

    /// Creates the context of a domain that has no key yet.
    ///
    /// Call [`set_key`](Self::set_key) before the domain is entered. Without a key the gate faults right after it has
    /// switched the rights, and [`Gate::running`] does not find the call.
    #[must_use]
    pub const fn without_key(stack: u64, fs_base: u64) -> Self {
        let caller = Caller { stack: 0, fs_base: 0, gs_base: 0, rights: 0, mxcsr: 0, x87_control: 0 };
        let (rights, caller) = (KeyRights::NONE.bits(), UnsafeCell::new(caller));
        Self { stack: stack & !15, fs_base, rights, key: 0, identity: u32::MAX, caller }
    }

    /// Replaces the domain's own key and its rights.
    ///
    /// # Panics
    ///
    /// Panics as [`new`](Self::new) does.
    pub const fn set_key(&mut self, key: ProtectionKey, rights: KeyRights) {
        assert!(rights.get(key).is_empty(), "the rights must allow writes under the domain's own key");
        assert!(!rights.get(ProtectionKey::DEFAULT).is_empty(), "the rights must not allow writes under key 0");
        self.rights = rights.bits();
        self.key = key.number() as u32;
        self.identity = 3 | 3 << (2 * key.number());
    }

    /// Replaces the domain's stack and FS base. `stack` is as in [`new`](Self::new).
    pub const fn set_place(&mut self, stack: u64, fs_base: u64) {
        self.stack = stack & !15;
        self.fs_base = fs_base;
    }

    /// Returns the address one past the end of the domain's stack.
    #[must_use]
    pub const fn stack(&self) -> u64 {
        self.stack
    }

    /// Returns the domain's own key; key 0 if it has none yet.
    ///
    /// # Panics
    ///
    /// Never: the stored number is below 16.
    #[must_use]
    #[inline]
    pub const fn key(&self) -> ProtectionKey {
        ProtectionKey::new(self.key as u8).expect("a context's key is below 16")
    }

    /// Returns the domain's rights.
    #[must_use]
    pub const fn rights(&self) -> KeyRights {
        KeyRights::from_bits(self.rights)
    }

    /// Returns the rights of the caller of the last call.
    #[must_use]
    #[inline]
    pub const fn caller_rights(&self) -> KeyRights {
        // SAFETY: `Context` is not Sync, so only this thread uses the cell, and only the gate's way in writes it.
        KeyRights::from_bits(unsafe { (*self.caller.get()).rights })
    }

    /// Returns whether the caller of the last call could write under the domain's own key and under key 0.
    #[must_use]
    #[inline]
    pub const fn caller_has_rights(&self) -> bool {
        self.caller_rights().bits() & self.identity == 0
    }

    /// Adds the rights to read and write under `key` to the caller's saved rights.
    ///
    /// They take effect when the call ends.
    pub fn grant_to_caller(&self, key: ProtectionKey) {
        let rights = self.caller_rights().with(key, AccessRights::READ_WRITE);
        // SAFETY: `Context` is not Sync, so no other thread uses the cell, and the gate reads it only when the call
        // ends.
        unsafe { (*self.caller.get()).rights = rights.bits() };
    }

    /// Returns the FS base of the caller of the last call.
    #[must_use]
    pub const fn caller_fs_base(&self) -> u64 {
        // SAFETY: as in `caller_rights`.
        unsafe { (*self.caller.get()).fs_base }
    }

    /// Returns the stack pointer of the caller of the last call. During the call the stack below it is unused.
    #[must_use]
    pub const fn caller_stack(&self) -> u64 {
        // SAFETY: as in `caller_rights`.
        unsafe { (*self.caller.get()).stack }
    }
}

// SAFETY: a context is plain data without thread affinity, and `Gate::enter` requires exclusive use during a call.
unsafe impl Send for Context {}

/// How a call through the gate ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The entry point returned this word. The domain chose it, so it is hostile.
    Returned(u64),
    /// A trap ended the call.
    Rewound,
}

/// The state in which the fault handler resumes the caller.
///
/// The handler writes `fs_base` into the register, because interrupt and signal frames do not hold it. It writes
/// everything else into the frame that it returns through, and clears the flags [`CLEARED_FLAGS`](Self::CLEARED_FLAGS)
/// there. All of it must be in force when the handler returns: another interrupt or signal may arrive before the gate's
/// first instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rewind {
    /// The instruction pointer.
    pub instruction: u64,
    /// The stack pointer.
    pub stack: u64,
    /// R10: the context.
    pub r10: u64,
    /// The FS base.
    pub fs_base: u64,
    /// The rights register: the caller's value.
    pub rights: KeyRights,
}

impl Rewind {
    /// The bits of RFLAGS that must be clear when the caller resumes: TF, DF, NT and AC. The domain can have set them.
    pub const CLEARED_FLAGS: u64 = 1 << 8 | 1 << 10 | 1 << 14 | 1 << 18;
}

/// The table of running contexts, indexed by the domain's own key. It fills whole pages.
#[repr(align(4096))]
struct Active([AtomicPtr<Context>; ProtectionKey::COUNT]);

impl Active {
    const fn new() -> Self {
        Self([const { AtomicPtr::new(ptr::null_mut()) }; ProtectionKey::COUNT])
    }

    /// Finds the call that runs with these rights.
    ///
    /// # Safety
    ///
    /// As for [`Gate::running`].
    unsafe fn find(&self, rights: KeyRights) -> Option<NonNull<Context>> {
        // No domain can write under key 0, so these are a caller's rights. They can include the own keys of domains
        // that run on other threads, whose contexts may be freed during the search.
        if rights.get(ProtectionKey::DEFAULT).is_empty() {
            return None;
        }
        let own = ProtectionKey::all().filter(|key| rights.get(*key).is_empty());
        let mut running = own.filter_map(|key| NonNull::new(self.0[key.index()].load(Ordering::Relaxed)));
        let found = running.next()?;
        if running.next().is_some() {
            // Code in a domain has opened the key of another running domain, so the rights are ambiguous.
            return None;
        }
        // SAFETY: rights that allow writes under a domain's own key, and none under key 0, are in force only while that
        // domain runs on this CPU or thread. Its call has not ended, so its context is alive.
        let context = unsafe { found.as_ref() };
        ((context.rights ^ rights.bits()) & context.identity == 0).then_some(found)
    }
}

static ACTIVE_PKRU: Active = Active::new();
static ACTIVE_PKRS: Active = Active::new();

/// A call gate. There is one for each rights register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// The gate that switches PKRU, for domains in user pages.
    Pkru,
    /// The gate that switches PKRS, for domains in supervisor pages.
    Pkrs,
}

impl Gate {
    /// Enters a domain, calls `entry` with `argument` there, and returns how the call ended.
    ///
    /// The context may be the first field of a larger structure: [`running`](Self::running) returns the same pointer to
    /// a fault handler.
    ///
    /// # Safety
    ///
    /// - The context is alive and has a key. During the call only a fault handler on this CPU and thread uses it.
    /// - Domains can write neither the context nor the gate's [`state`](Self::state).
    /// - The rights register of this gate is usable and CR4.FSGSBASE is 1. For PKRS the CPU runs in ring 0.
    /// - No memory is mapped at address 0. See the [module documentation](self).
    /// - The context's stack is mapped and writable with the context's rights, and nothing else uses it during the
    ///   call.
    /// - `entry` can run with the context's FS base.
    /// - No other call runs with the context's own key, and no other domain has rights to it. During the call no other
    ///   code writes memory under it.
    /// - A fault handler is installed that passes traps in the domain to [`Gate::rewind`].
    /// - The caller treats the result, and everything that it reads from the domain's memory, as hostile.
    #[inline]
    pub unsafe fn enter(self, context: *mut Context, entry: Entry, argument: u64) -> Exit {
        let (value, rewound): (u64, u64);
        macro_rules! call {
            ($enter:path) => {
                // SAFETY: the caller meets the contract of `enter`. The gate preserves RBX and RBP, and the operands
                // declare every other register that it changes.
                unsafe {
                    asm!(
                        "call {enter}",
                        enter = sym $enter,
                        inout("r10") context => _,
                        inout("r8") entry => _,
                        inout("rdi") argument => _,
                        lateout("rsi") value,
                        lateout("rdx") rewound,
                        lateout("r12") _,
                        lateout("r13") _,
                        lateout("r14") _,
                        lateout("r15") _,
                        clobber_abi("C"),
                    )
                }
            };
        }
        match self {
            Self::Pkru => call!(pkru::enter),
            Self::Pkrs => call!(pkrs::enter),
        }
        if rewound == 0 { Exit::Returned(value) } else { Exit::Rewound }
    }

    /// Returns the context of the call that runs with these rights on this CPU or thread.
    ///
    /// A fault handler passes the rights that were in force at the trap. Returns `None` if they are not a running
    /// domain's.
    ///
    /// # Safety
    ///
    /// The rights are in force on this CPU or thread, or were when the trap interrupted it, and no call has begun or
    /// ended on it since. The context of another one's call may be freed while this function looks at it.
    #[must_use]
    pub unsafe fn running(self, rights: KeyRights) -> Option<NonNull<Context>> {
        // SAFETY: the caller guarantees this.
        unsafe { self.active().find(rights) }
    }

    /// Returns the context of the running call of the domain with this own key, on any CPU or thread.
    ///
    /// A call on another CPU or thread can end at any time, and its context be freed. Use the pointer only on the CPU
    /// or thread that runs the call.
    #[must_use]
    pub fn running_with(self, key: ProtectionKey) -> Option<NonNull<Context>> {
        NonNull::new(self.active().0[key.index()].load(Ordering::Relaxed))
    }

    /// Ends the call of a running context and returns the state in which its caller resumes.
    ///
    /// # Safety
    ///
    /// - [`Gate::running`] or [`Gate::running_with`] returned the context, for a trap on this CPU and thread.
    /// - The handler resumes there in exactly the state returned.
    #[must_use]
    pub unsafe fn rewind(self, context: NonNull<Context>) -> Rewind {
        // SAFETY: the call is running, so its context is alive.
        let context = unsafe { context.as_ref() };
        self.active().0[context.key().index()].store(ptr::null_mut(), Ordering::Relaxed);
        Rewind {
            instruction: rewind as *const () as usize as u64,
            stack: context.caller_stack(),
            r10: ptr::from_ref(context) as u64,
            fs_base: context.caller_fs_base(),
            rights: context.caller_rights(),
        }
    }

    /// Removes an interrupted call from the table while other code runs, such as the program's signal handler.
    ///
    /// A fault in that code is not the domain's, so [`running`](Self::running) must not find the call.
    /// [`show`](Self::show) puts it back.
    ///
    /// # Safety
    ///
    /// - [`Gate::running`] or [`Gate::running_with`] returned the context, for a trap or interrupt on this CPU and
    ///   thread.
    /// - The call does not continue before `show`.
    pub unsafe fn hide(self, context: NonNull<Context>) {
        // SAFETY: the call is running, so its context is alive.
        let key = unsafe { context.as_ref() }.key();
        self.active().0[key.index()].store(ptr::null_mut(), Ordering::Relaxed);
    }

    /// Puts a call back into the table that [`hide`](Self::hide) removed.
    ///
    /// # Safety
    ///
    /// The context is hidden, and its call is about to continue on this CPU and thread.
    pub unsafe fn show(self, context: NonNull<Context>) {
        // SAFETY: the call has not ended, so its context is alive.
        let key = unsafe { context.as_ref() }.key();
        self.active().0[key.index()].store(context.as_ptr(), Ordering::Relaxed);
    }

    /// Returns the address range of the table of running contexts: whole pages with nothing else on them. Domains must
    /// not be able to write it.
    #[must_use]
    pub fn state(self) -> Range<usize> {
        let start = ptr::from_ref(self.active()).addr();
        start..start + size_of::<Active>()
    }

    const fn active(self) -> &'static Active {
        match self {
            Self::Pkru => &ACTIVE_PKRU,
            Self::Pkrs => &ACTIVE_PKRS,
        }
    }
}

/// Leaves a domain in the middle of a call, as if the entry point had returned `word`. It keeps the domain's stack.
///
/// Code in a domain uses it to request a callback from its caller. `key` is the domain's own key, and `stack` the end
/// of its stack, as in its context.
///
/// To continue the call, the caller [enters](Gate::enter) the domain again with an entry point that restores the stack
/// pointer. The gate starts the entry point at the top of the same stack, so it must not write to the stack before
/// that.
///
/// # Safety
///
/// The calling code runs in a domain, and the gate entered that domain on this stack with this key.
#[unsafe(naked)]
pub unsafe extern "C" fn suspend(key: u64, word: u64, stack: u64) -> ! {
    // The address to return to lies at the top of the domain's stack: the gate's CALL has pushed it there.
    naked_asm!("mov rbx, rdi", "mov rax, rsi", "lea rsp, [rdx - 8]", "ret")
}

/// Flags that the way out clears: NT makes the caller's IRET trap, and AC its misaligned accesses.
const FLAGS: u32 = 1 << 14 | 1 << 18;

/// The common end of the way out and of a rewind. On entry the caller's rights and FS base are in force, R10 = context,
/// RSI and RDX = the values to return.
macro_rules! leave {
    () => {
        "mov rcx, [r10 + {gs_base}]
        wrgsbase rcx
        mov rsp, [r10 + {caller_stack}]
        cld
        /* POPF is slow, so only where one of the flags is set. */
        pushfq
        test dword ptr [rsp], {flags}
        jz 2f
        and dword ptr [rsp], ~{flags}
        popfq
        push rax
        2: pop rax
        fninit
        fldcw [r10 + {x87}]
        ldmxcsr [r10 + {mxcsr}]
        pop rbx
        pop rbp
        ret"
    };
}

/// Defines the gate of one rights register.
///
/// `select` loads ECX with the register's selector. `read` reads the register into EAX and clears EDX. `write` writes
/// EAX to it and leaves EDX = 0.
macro_rules! gate {
    ($module:ident, $active:ident, select: $select:literal, read: $read:literal, write: $write:literal) => {
        mod $module {
            use super::*;

            /// The way in and out. On entry R10 = context, R8 = entry point, RDI = argument. On return RSI = result and
            /// RDX = 0.
            #[unsafe(naked)]
            pub(super) unsafe extern "C" fn enter() {
                naked_asm!(
                    // Save the caller's state on its stack and in the context. The domain can write neither.
                    "push rbp",
                    "push rbx",
                    "stmxcsr [r10 + {mxcsr}]",
                    "fnstcw [r10 + {x87}]",
                    "rdfsbase rax",
                    "mov [r10 + {caller_fs_base}], rax",
                    "rdgsbase rax",
                    "mov [r10 + {gs_base}], rax",
                    "mov [r10 + {caller_stack}], rsp",
                    $select,
                    $read,
                    "mov [r10 + {caller_rights}], eax",
                    // Publish the context under the domain's key.
                    "mov ebx, [r10 + {key}]",
                    "lea r11, [rip + {active}]",
                    "mov [r11 + rbx*8], r10",
                    "mov eax, [r10 + {rights}]",
                    $write,
                    // Code in a domain may have jumped to the write: trust no register that was set before.
                    "and ebx, 15",
                    "lea r11, [rip + {active}]",
                    "mov r10, [r11 + rbx*8]",
                    "cmp eax, [r10 + {rights}]",
                    "jne {stop}",
                    "mov rcx, [r10 + {fs_base}]",
                    "wrfsbase rcx",
                    "mov rsp, [r10 + {stack}]",
                    "xor esi, esi",
                    "xor ebp, ebp",
                    "xor r9d, r9d",
                    "xor r12d, r12d",
                    "xor r13d, r13d",
                    "xor r14d, r14d",
                    "xor r15d, r15d",
                    "call r8",
                    "mov rsi, rax",
                    // RBX holds an untrusted key number. Keep the index inside the table.
                    "and ebx, 15",
                    "lea r11, [rip + {active}]",
                    "mov r10, [r11 + rbx*8]",
                    // Verify it: the rights in force must be this context's. The number of another domain's key traps
                    // here, or at the read through a null entry, with the domain's rights still in force.
                    $select,
                    $read,
                    "xor eax, [r10 + {rights}]",
                    "test eax, [r10 + {identity}]",
                    "jne {stop}",
                    "mov rsp, [r10 + {caller_stack}]",
                    "mov r9, [r10 + {caller_fs_base}]",
                    "wrfsbase r9",
                    "mov eax, [r10 + {caller_rights}]",
                    $write,
                    // Code in a domain may have jumped to the write: trust no register that was set before.
                    "and ebx, 15",
                    "lea r11, [rip + {active}]",
                    "mov r10, [r11 + rbx*8]",
                    "cmp eax, [r10 + {caller_rights}]",
                    "jne {stop}",
                    "rdfsbase rax",
                    "cmp rax, [r10 + {caller_fs_base}]",
                    "jne {stop}",
                    "mov qword ptr [r11 + rbx*8], 0",
                    // EDX is 0 since the write of the rights register.
                    leave!(),
                    mxcsr = const CALLER_MXCSR,
                    x87 = const CALLER_X87,
                    caller_fs_base = const CALLER_FS_BASE,
                    gs_base = const CALLER_GS_BASE,
                    caller_stack = const CALLER_STACK,
                    caller_rights = const CALLER_RIGHTS,
                    key = const offset_of!(Context, key),
                    rights = const offset_of!(Context, rights),
                    identity = const offset_of!(Context, identity),
                    fs_base = const offset_of!(Context, fs_base),
                    stack = const offset_of!(Context, stack),
                    flags = const FLAGS,
                    active = sym $active,
                    stop = sym stop,
                )
            }
        }
    };
}

gate!(pkru, ACTIVE_PKRU, select: "xor ecx, ecx", read: "rdpkru", write: "wrpkru");
gate!(pkrs, ACTIVE_PKRS, select: "mov ecx, 0x6e1", read: "rdmsr", write: "xor edx, edx\n wrmsr");

const _: () = assert!(IA32_PKRS == 0x6e1, "the gate selects the MSR by its number");

/// The code at which a fault handler resumes. R10 = context; rights, stack pointer and FS base are the caller's.
#[unsafe(naked)]
unsafe extern "C" fn rewind() {
    naked_asm!(
        "xor esi, esi",
        "mov edx, 1",
        leave!(),
        gs_base = const CALLER_GS_BASE,
        caller_stack = const CALLER_STACK,
        flags = const FLAGS,
        mxcsr = const CALLER_MXCSR,
        x87 = const CALLER_X87,
    )
}

/// Traps, after a check of the gate has failed.
#[unsafe(naked)]
unsafe extern "C" fn stop() {
    naked_asm!("ud2")
}
