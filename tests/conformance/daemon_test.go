package conformance

import (
	"context"
	"os"
	"os/exec"
	"testing"
	"time"
)

// TestDaemon is about the process around the socket.
func TestDaemon(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := family(t)
	st, err := os.Stat(s.socket)
	must(t, err)
	if st.Mode().Perm() != 0o600 {
		t.Errorf("socket has mode %o, want 600", st.Mode().Perm())
	}

	file := s.dir + "/not-a-socket"
	write(t, file, "precious")
	for what, args := range map[string][]string{
		"a second daemon on the root":   {"--root", s.root, "--address", s.dir + "/s2"},
		"a second daemon on the socket": {"--root", s.dir + "/root2", "--address", s.socket},
		"a file where the socket goes":  {"--root", s.dir + "/root3", "--address", file},
	} {
		ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
		cmd := exec.CommandContext(ctx, binary, append([]string{"serve"}, args...)...)
		cmd.Env = environ()
		out, err := cmd.CombinedOutput()
		if ctx.Err() != nil || err == nil {
			t.Errorf("%s was not refused: %v\n%s", what, err, out)
		} else if len(out) == 0 {
			t.Errorf("%s was refused without a word", what)
		}
		cancel()
		s.wantNames(t, familyNames...)
	}
	wantFile(t, file, "precious")
	// The first one is still whole: same socket, same answers, a clean end.
	_, err = s.mounts("active")
	must(t, err)
	s.wantConsistent(t)
}
